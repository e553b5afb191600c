"""Which entities come back after so long a silence that what they held counts as forgotten.

Time is the largest event time of the partition, whoever's event it is: neither the wall clock nor how far an entity's
own clock lags behind. So an entity that is silent for too long stays so until its next event, which begins it anew,
and giving its memory back before changes nothing.
"""

import numpy as np

from streaming.compile_kernels import kernel
from streaming.key_arrays import KeyArrays
from streaming.records import Bools, Ints
from streaming.windows import NEVER_US


class Idleness(KeyArrays):
    """For each entity [K] the largest event time of the partition when its last event came.

    Args:
        ttl_us: An entity is forgotten once that time has gone on by more.

    Attributes:
        newest_us: The largest event time of the partition.
    """

    def __init__(self, ttl_us: int) -> None:
        super().__init__(-NEVER_US)
        self.newest_us = -NEVER_US
        self._ttl_us = ttl_us

    @property
    def _heard_us(self) -> Ints:
        heard_us: Ints = self._arrays[0]
        return heard_us

    def newest(self, times: Ints, seen: Bools) -> Ints:
        """The largest event time [N] of the partition at each event; only those that were `seen` count."""
        newest: Ints = np.maximum.accumulate(np.where(seen, np.maximum(times, self.newest_us), self.newest_us))
        return newest

    def anew(self, ids: Ints, newest: Ints) -> Bools:
        """Which events [N] begin their entity anew; `hear` follows for the same events, perhaps in pieces."""
        return _anew(ids, newest, self._ttl_us, self._heard_us)

    def hear(self, ids: Ints, newest: Ints) -> None:
        """Notes N events, but for those of id -1."""
        known = ids >= 0
        self._heard_us[ids[known]] = newest[known]  # it rises, so of several the last one, which stays, is the largest
        self.newest_us = int(newest[-1])

    def silent(self, keys: int) -> Bools:
        """Which of the first `keys` entities are forgotten, whenever their next event comes."""
        silent: Bools = self._heard_us[:keys] + self._ttl_us < self.newest_us
        return silent


@kernel
def _anew(ids: Ints, newest: Ints, ttl_us: int, heard_us: Ints) -> Bools:
    anew = np.zeros(len(ids), dtype=np.bool_)
    before = np.empty(len(ids), dtype=np.int64)
    for row in range(len(ids)):
        key = ids[row]
        if key >= 0:
            before[row] = heard_us[key]
            anew[row] = before[row] != -NEVER_US and before[row] + ttl_us < newest[row]
            heard_us[key] = newest[row]
    for row in range(len(ids) - 1, -1, -1):  # as it was
        if ids[row] >= 0:
            heard_us[ids[row]] = before[row]
    return anew
