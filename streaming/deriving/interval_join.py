"""Two streams joined in an interval of time, such as predictions with the labels that come for them.

Every left event meets every right event of the same key whose time is between `earliest` and `latest` after its own,
once, whichever came first. The watermark is the lesser of both sides' clocks less their delays. A left event is late
when the watermark has passed its time + `latest` (or its time, if that is later), a right event when it has passed its
time; so what waits can go, and a left event that went without a partner has none among the events in time.
"""

from typing import NamedTuple

import numpy as np

from streaming.compile_kernels import kernel
from streaming.deriving.buffered_join import BufferedJoin
from streaming.deriving.derivation import Derivation
from streaming.deriving.join_input import FUTURE, LATE
from streaming.deriving.join_rows import (
    AHEAD,
    MATCHED,
    NO_ROW,
    OLDER,
    TIME,
    WAITING,
    Arrived,
    Held,
    ask_for,
    insert,
    pop,
    push,
    with_room,
)
from streaming.plan import FUTURE_US
from streaming.records import Bools, Ints


class _Interval(NamedTuple):
    """What the kernels know of a join, in microseconds.

    Attributes:
        earliest: Least time of the right less that of the left.
        latest: The greatest.
        grace: How far behind the watermark a left event may be.
        unmatched: Whether left events wait, to be given without a partner.
    """

    earliest: int
    latest: int
    grace: int
    unmatched: bool


class IntervalJoin(BufferedJoin):
    """The join of one partition of each side, see the module.

    Args:
        derivation: What is joined.

    Raises:
        PlanError: It cannot be.
    """

    def __init__(self, derivation: Derivation) -> None:
        super().__init__(derivation)
        latest_us = derivation.latest_us
        self._interval = _Interval(derivation.earliest_us, latest_us, max(latest_us, 0), derivation.unmatched)

    @property
    def _waits(self) -> bool:
        return self._derivation.unmatched

    @property
    def _left_found(self) -> bool:
        return True

    def _take(self, side: int, arrived: Arrived, verdicts: Ints, than_us: Ints) -> Ints:
        own, other = self._buffers.sides[side].held, self._buffers.sides[1 - side].held
        clock = self._clock
        pairs = _take(side, arrived, self._interval, clock.times_us, clock.delays_us, own, other, verdicts, than_us)
        return pairs

    def _release(self, mark_us: int) -> Ints:
        pairs = np.empty((16, 2), dtype=np.int64)
        if not self._waits:
            return pairs[:0]
        pairs, count = _release(self._interval, mark_us, self._buffers.sides[0].held, pairs, 0)
        return pairs[:count]

    def _kept(self) -> tuple[Bools, Bools]:
        left, right = (side.rows[:, TIME] for side in self._buffers.sides)
        mark_us, interval = self._clock.mark_us, self._interval
        return left + interval.latest >= mark_us, right - interval.earliest + interval.grace >= mark_us

    def _needless(self) -> int:
        interval = self._interval
        gone_us = self._buffers.newest_then_us + max(interval.latest, interval.grace - interval.earliest)
        return self._buffers.rows_then if gone_us < self._clock.mark_us else 0


@kernel
def _take(
    side: int,
    arrived: Arrived,
    interval: _Interval,
    clocks: Ints,
    delays: Ints,
    own: Held,
    other: Held,
    verdicts: Ints,
    than_us: Ints,
) -> Ints:
    """Takes records of a side one by one; gives the pairs in the order in which they come out."""
    first, last, grace = interval.earliest, interval.latest, interval.grace
    if side == 1:
        first, last, grace = -interval.latest, -interval.earliest, 0
    pairs, count = np.empty((len(arrived.ids) + 16, 2), dtype=np.int64), 0
    mark = min(clocks[0] - delays[0], clocks[1] - delays[1])
    left = own if side == 0 else other
    for record in range(len(arrived.ids)):
        ask_for(own, other, arrived, record + AHEAD)
        if arrived.ids[record] < 0:
            continue
        time = arrived.times[record]
        if time > arrived.now_us + FUTURE_US:
            verdicts[record], than_us[record] = FUTURE, arrived.now_us
            continue
        if time > clocks[side]:
            clocks[side] = time
            mark = min(clocks[0] - delays[0], clocks[1] - delays[1])
            if interval.unmatched:
                pairs, count = _release(interval, mark, left, pairs, count)
        if time + grace < mark:
            verdicts[record], than_us[record] = LATE, mark
            continue
        row = insert(own, arrived, record)
        before = count
        at = other.newest[arrived.ids[record]]
        while at != NO_ROW and other.rows[at, TIME] > time + last:
            at = other.rows[at, OLDER]
        while at != NO_ROW and other.rows[at, TIME] >= time + first:
            pairs = with_room(pairs, count)
            pairs[count, side], pairs[count, 1 - side] = row, at
            left.rows[pairs[count, 0], MATCHED] = 1
            count += 1
            at = other.rows[at, OLDER]
        pairs[before:count] = pairs[before:count][::-1].copy()
        if interval.unmatched and side == 0:
            push(own, row)
            if time + interval.latest < mark:  # nothing can come for it any more
                pairs, count = _release(interval, mark, left, pairs, count)
    return pairs[:count]


@kernel
def _release(interval: _Interval, mark: int, left: Held, pairs: Ints, count: int) -> tuple[Ints, int]:
    """Adds the left rows without a partner that the watermark has passed, by time and then by arrival."""
    while left.fill[WAITING] > 0 and left.heap[0, 0] + interval.latest < mark:
        row = pop(left)
        if left.rows[row, MATCHED] == 0:
            pairs = with_room(pairs, count)
            pairs[count, 0], pairs[count, 1] = row, NO_ROW
            count += 1
    return pairs, count
