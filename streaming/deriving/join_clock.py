"""Event time of the two sides of a join."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from streaming.records import Ints
from streaming.windows import NEVER_US


class JoinClock:
    """The clock of each side, which goes on with the wall clock while the side is idle.

    Args:
        delays_us: How far the watermark of each side stays behind its clock.

    Attributes:
        times_us: [2] the greatest event time of each side, below zero by 146,000 years before the first; kernels write
            to it.
        delays_us: [2].
    """

    def __init__(self, delays_us: Sequence[int]) -> None:
        self.times_us: Ints = np.full(2, -NEVER_US, dtype=np.int64)
        self.delays_us: Ints = np.array(delays_us, dtype=np.int64)
        self._heard: list[tuple[int, int] | None] = [None, None]  # event time and wall clock when a side had its last

    @property
    def mark_us(self) -> int:
        """The watermark: no event is expected below it on either side."""
        return int((self.times_us - self.delays_us).min())

    def heard(self, side: int, now_us: int) -> None:
        """Events of a side came, and its time is set."""
        self._heard[side] = (int(self.times_us[side]), now_us)

    def leave_out(self, side: int, wall_us: int) -> None:
        """Lets `tick` not count so much of the wall-clock time since the last event of a side."""
        if (last := self._heard[side]) is not None:
            self._heard[side] = (last[0], last[1] + wall_us)

    def tick(self, now_us: int, side: int, level: bool) -> None:
        """Moves the clock of an idle side on by the wall-clock time since its last event.

        One that had no event yet begins where the other is.

        Args:
            now_us: The wall clock.
            side: It has been read to its end: what still waits in Kafka would come late.
            level: Let it catch up with the other side at once.
        """
        other = int(self.times_us[1 - side])
        if self._heard[side] is None and other != -NEVER_US:
            self.times_us[side] = other
            self.heard(side, now_us)
        last = self._heard[side]
        if last is not None:
            moved = max(last[0] + now_us - last[1], other if level else -NEVER_US)
            self.times_us[side] = max(int(self.times_us[side]), moved)

    def state(self) -> dict[str, Any]:
        """What `restore` takes, as JSON."""
        return {"times_us": self.times_us.tolist(), "heard": self._heard}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes the state of another clock."""
        self.times_us[:] = state["times_us"]
        self._heard = [None if each is None else (each[0], each[1]) for each in state["heard"]]
