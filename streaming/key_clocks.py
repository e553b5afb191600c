"""Event time of each entity by itself: for devices whose clocks differ, or that send what they have stored in bulk."""

from typing import Any

import numpy as np
import numpy.typing as npt

from streaming.cells import grown
from streaming.compile_kernels import kernel
from streaming.records import Ints
from streaming.windows import NEVER_US


class KeyClocks:
    """For each entity [K] its largest event time, and the wall clock when that came.

    Attributes:
        now_us: [K] the clock of each entity, which goes on with the wall clock while the partition is read to its end.
    """

    def __init__(self) -> None:
        self.now_us = np.zeros(0, dtype=np.int64)
        self._ahead_us = np.zeros(0, dtype=np.int64)  # `now_us` as it will be when the events at hand are added
        self._event_us = np.zeros(0, dtype=np.int64)
        self._heard_us = np.zeros(0, dtype=np.int64)

    def reserve(self, keys: int) -> None:
        """Makes room for so many entities."""
        self.now_us, self._ahead_us = grown(self.now_us, keys, -NEVER_US), grown(self._ahead_us, keys, -NEVER_US)
        self._event_us, self._heard_us = grown(self._event_us, keys, -NEVER_US), grown(self._heard_us, keys, 0)

    def marks(self, ids: Ints, times: Ints) -> Ints:
        """The clock [N] of each event's entity at that event; `move` follows for the same events, perhaps in pieces."""
        return _marks(ids, times, self._ahead_us)

    def move(self, ids: Ints, times: Ints, wall_us: int) -> None:
        """Moves the clocks of N events' entities."""
        np.maximum.at(self.now_us, ids, times)
        self._event_us[ids] = self.now_us[ids]
        self._heard_us[ids] = wall_us

    def tick(self, known: int, wall_us: int) -> None:
        """Moves the clocks of the first `known` entities on by the wall-clock time since their last event."""
        moved = self._event_us[:known] + wall_us - self._heard_us[:known]
        np.maximum(self.now_us[:known], moved, out=self.now_us[:known])
        self._ahead_us[:known] = self.now_us[:known]

    def leave_out(self, known: int, wall_us: int) -> None:
        """Lets `tick` not count so much of the time since the last event of the first `known` entities."""
        self._heard_us[:known] += wall_us

    def keep(self, ids: Ints) -> None:
        """Forgets all entities but those of `ids`, which become 0, 1, ... in this order."""
        self.now_us, self._ahead_us = self.now_us[ids], self._ahead_us[ids]
        self._event_us, self._heard_us = self._event_us[ids], self._heard_us[ids]

    def state(self, ids: Ints) -> list[npt.NDArray[Any]]:
        """The arrays of some entities, for `restore`."""
        return [self.now_us[ids], self._event_us[ids], self._heard_us[ids]]

    def restore(self, ids: Ints, arrays: list[npt.NDArray[Any]]) -> None:
        """Takes the arrays of `state` for these entities, for which there is room."""
        self.now_us[ids], self._event_us[ids], self._heard_us[ids] = arrays
        self._ahead_us[ids] = self.now_us[ids]


@kernel
def _marks(ids: Ints, times: Ints, clocks: Ints) -> Ints:
    marks = np.empty(len(ids), dtype=np.int64)
    for row in range(len(ids)):
        if ids[row] < 0:
            marks[row] = -NEVER_US
            continue
        clocks[ids[row]] = max(clocks[ids[row]], times[row])
        marks[row] = clocks[ids[row]]
    return marks
