"""Event time of each entity by itself: for devices whose clocks differ, or that send what they have stored in bulk."""

import numpy as np

from streaming.compile_kernels import kernel
from streaming.key_arrays import KeyArrays
from streaming.records import Bools, Ints
from streaming.windows import NEVER_US


class KeyClocks(KeyArrays):
    """For each entity [K] its clock, the clock at its last event, and the wall clock then, less what was left out.

    Attributes:
        ticked_us: The wall clock up to which clocks have gone on.
    """

    def __init__(self) -> None:
        super().__init__(-NEVER_US, -NEVER_US, 0)
        self.ticked_us = 0

    @property
    def now_us(self) -> Ints:
        """The clock [K] of each entity, which goes on with the wall clock while the partition is read to its end."""
        now_us: Ints = self._arrays[0]
        return now_us

    def marks(self, ids: Ints, times: Ints, anew: Bools) -> Ints:
        """The clock [N] of each event's entity at that event; `move` follows for the same events, perhaps in pieces.

        Args:
            ids: [N], -1 for none.
            times: [N].
            anew: [N], the events with which the clock of their entity begins anew; empty for none.
        """
        return _marks(ids, times, anew, self.now_us)

    def move(self, ids: Ints, clocks: Ints, wall_us: int) -> None:
        """Moves the clocks of N events' entities, but for those of id -1, to what they are at these events [N]."""
        known = ids >= 0
        at = ids[known]
        now_us, event_us, heard_us = self._arrays
        now_us[at] = event_us[at] = clocks[known]  # of several the last one stays
        heard_us[at] = wall_us

    def tick(self, known: int, wall_us: int) -> None:
        """Moves the clocks of the first `known` entities on by the wall-clock time since their last event."""
        now_us, event_us, heard_us = self._arrays[:, :known]
        np.maximum(now_us, event_us + wall_us - heard_us, out=now_us)
        self.ticked_us = wall_us

    def leave_out(self, known: int, wall_us: int) -> None:
        """Lets `tick` not count so much of the time since the last event of the first `known` entities."""
        self._arrays[2, :known] += wall_us


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
