"""Event time of each entity by itself: for devices whose clocks differ, or that send what they have stored in bulk."""

from typing import Any

import numpy as np
import numpy.typing as npt

from streaming.cells import grown
from streaming.compile_kernels import kernel
from streaming.records import Bools, Ints
from streaming.windows import NEVER_US


class KeyClocks:
    """For each entity [K] its largest event time, and the wall clock when that came.

    Attributes:
        now_us: [K] the clock of each entity, which goes on with the wall clock while the partition is read to its end.
        ticked_us: The wall clock up to which it has done so.
    """

    def __init__(self) -> None:
        self.now_us = np.zeros(0, dtype=np.int64)
        self.ticked_us = 0
        self._event_us = np.zeros(0, dtype=np.int64)
        self._heard_us = np.zeros(0, dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Memory that an entity takes."""
        return self.now_us.itemsize + self._event_us.itemsize + self._heard_us.itemsize

    def reserve(self, keys: int) -> None:
        """Makes room for so many entities."""
        self.now_us = grown(self.now_us, keys, -NEVER_US)
        self._event_us, self._heard_us = grown(self._event_us, keys, -NEVER_US), grown(self._heard_us, keys, 0)

    def marks(self, ids: Ints, times: Ints, anew: Bools) -> Ints:
        """The clock [N] of each event's entity at that event; `move` follows for the same events, perhaps in pieces.

        Args:
            ids: [N], -1 for none.
            times: [N].
            anew: [N], the events with which the clock of their entity begins anew; empty for none.
        """
        return _marks(ids, times, anew, self.now_us)

    def move(self, ids: Ints, times: Ints, anew: Bools, wall_us: int) -> None:
        """Moves the clocks of N events' entities."""
        _move(ids, times, anew, wall_us, self.now_us, self._event_us, self._heard_us)

    def tick(self, known: int, wall_us: int) -> None:
        """Moves the clocks of the first `known` entities on by the wall-clock time since their last event."""
        moved = self._event_us[:known] + wall_us - self._heard_us[:known]
        np.maximum(self.now_us[:known], moved, out=self.now_us[:known])
        self.ticked_us = wall_us

    def leave_out(self, known: int, wall_us: int) -> None:
        """Lets `tick` not count so much of the time since the last event of the first `known` entities."""
        self._heard_us[:known] += wall_us

    def keep(self, ids: Ints) -> None:
        """Forgets all entities but those of `ids`, which become 0, 1, ... in this order."""
        self.now_us = self.now_us[ids]
        self._event_us, self._heard_us = self._event_us[ids], self._heard_us[ids]

    def state(self, ids: Ints) -> list[npt.NDArray[Any]]:
        """The arrays of some entities, for `restore`."""
        return [self.now_us[ids], self._event_us[ids], self._heard_us[ids]]

    def restore(self, ids: Ints, arrays: list[npt.NDArray[Any]]) -> None:
        """Takes the arrays of `state` for these entities, for which there is room."""
        self.now_us[ids], self._event_us[ids], self._heard_us[ids] = arrays


@kernel
def _marks(ids: Ints, times: Ints, anew: Bools, now_us: Ints) -> Ints:
    marks = np.empty(len(ids), dtype=np.int64)
    before = np.empty(len(ids), dtype=np.int64)
    for row in range(len(ids)):
        key = ids[row]
        if key < 0:
            marks[row] = -NEVER_US
            continue
        before[row] = now_us[key]
        if len(anew) and anew[row]:
            now_us[key] = -NEVER_US
        now_us[key] = marks[row] = max(now_us[key], times[row])
    for row in range(len(ids) - 1, -1, -1):  # as they were
        if ids[row] >= 0:
            now_us[ids[row]] = before[row]
    return marks


@kernel
def _move(ids: Ints, times: Ints, anew: Bools, wall_us: int, now_us: Ints, event_us: Ints, heard_us: Ints) -> None:
    for row in range(len(ids)):
        key = ids[row]
        if key < 0:
            continue
        if len(anew) and anew[row]:
            now_us[key] = -NEVER_US
        now_us[key] = max(now_us[key], times[row])
        event_us[key] = now_us[key]
        heard_us[key] = wall_us
