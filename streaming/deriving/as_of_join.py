"""Each event with the last value of another stream at its time, such as orders with prices.

A left event comes out once, when the right side's watermark has passed its time, with the last right event of the same
key that is not later and not older than the tolerance; of equal times the one of the greatest offset.

The horizon is the lesser of both sides' watermarks. Of the right side all events after it are kept, and the last of
each key before it. An event behind the horizon is taken where that is enough to know the answer, else it is late: a
left event when its key has had another right event since, or a tolerance let go what it needs; a right event when
there is a newer one before the horizon. A right event that comes behind the right side's watermark changes the answers
to left events that have not come out.
"""

import numpy as np

from streaming.compile_kernels import kernel
from streaming.deriving.buffered_join import BufferedJoin
from streaming.deriving.derivation import Derivation
from streaming.deriving.join_input import FUTURE, LATE
from streaming.deriving.join_rows import (
    AHEAD,
    KEY,
    MATCHED,
    NO_ROW,
    OLDER,
    TIME,
    WAITING,
    Arrived,
    Held,
    append,
    ask_for,
    insert,
    pop,
    push,
    with_room,
)
from streaming.plan import FUTURE_US
from streaming.records import Bools, Ints
from streaming.windows import NEVER_US


class AsOfJoin(BufferedJoin):
    """The join of one partition of each side, see the module.

    Args:
        derivation: What is joined.

    Raises:
        PlanError: It cannot be.
    """

    def __init__(self, derivation: Derivation) -> None:
        super().__init__(derivation)
        self._tolerance_us = NEVER_US if derivation.tolerance_us is None else derivation.tolerance_us

    @property
    def _waits(self) -> bool:
        return True

    @property
    def _left_found(self) -> bool:
        return False

    def _take(self, side: int, arrived: Arrived, verdicts: Ints, than_us: Ints) -> Ints:
        left, right = (each.held for each in self._buffers.sides)
        clock, take = self._clock, _take_right if side else _take_left
        return take(arrived, self._tolerance_us, clock.times_us, clock.delays_us, left, right, verdicts, than_us)

    def _release(self, mark_us: int) -> Ints:
        left, right = (each.held for each in self._buffers.sides)
        # The right side's own watermark is what left events wait for.
        own_us = mark_us if mark_us == NEVER_US else int(self._clock.times_us[1] - self._clock.delays_us[1])
        pairs, count = _release(self._tolerance_us, own_us, left, right, np.empty((16, 2), dtype=np.int64), 0)
        return pairs[:count]

    def _kept(self) -> tuple[Bools, Bools]:
        left, right = self._buffers.sides
        kept = _still_valid(right.held, len(right.rows), self._tolerance_us, self._clock.mark_us)
        return left.rows[:, MATCHED] == 0, kept

    def _needless(self) -> int:
        left = self._buffers.sides[0]
        return len(left.rows) - left.waiting


@kernel
def _take_left(
    arrived: Arrived,
    tolerance: int,
    clocks: Ints,
    delays: Ints,
    left: Held,
    right: Held,
    verdicts: Ints,
    than_us: Ints,
) -> Ints:
    """Takes left events one by one; gives those that come out at once, with their right row or none."""
    pairs, count = np.empty((len(arrived.ids), 2), dtype=np.int64), 0
    mark = clocks[1] - delays[1]
    for record in range(len(arrived.ids)):
        ask_for(left, right, arrived, record + AHEAD)
        key, time = arrived.ids[record], arrived.times[record]
        if key < 0:
            continue
        if time > arrived.now_us + FUTURE_US:
            verdicts[record], than_us[record] = FUTURE, arrived.now_us
            continue
        clocks[0] = max(clocks[0], time)
        horizon = min(clocks[0] - delays[0], mark)
        if time < horizon and not _is_known(right, key, time, tolerance, horizon):
            verdicts[record], than_us[record] = LATE, horizon
            continue
        row = append(left, arrived, record)
        if time < mark:
            left.rows[row, MATCHED] = 1
            pairs[count, 0], pairs[count, 1] = row, _as_of(right, key, time, tolerance)
            count += 1
        else:
            push(left, row)
    return pairs[:count]


@kernel
def _take_right(
    arrived: Arrived,
    tolerance: int,
    clocks: Ints,
    delays: Ints,
    left: Held,
    right: Held,
    verdicts: Ints,
    than_us: Ints,
) -> Ints:
    """Takes right events one by one; gives the left events that come out, with their right row or none."""
    pairs, count = np.empty((16, 2), dtype=np.int64), 0
    for record in range(len(arrived.ids)):
        ask_for(left, right, arrived, record + AHEAD)
        key, time = arrived.ids[record], arrived.times[record]
        if key < 0:
            continue
        if time > arrived.now_us + FUTURE_US:
            verdicts[record], than_us[record] = FUTURE, arrived.now_us
            continue
        if time > clocks[1]:
            clocks[1] = time
            pairs, count = _release(tolerance, time - delays[1], left, right, pairs, count)
        horizon = min(clocks[0] - delays[0], clocks[1] - delays[1])
        if time < horizon and (time + tolerance < horizon or _latest(right, key, horizon) > time):
            verdicts[record], than_us[record] = LATE, horizon
            continue
        insert(right, arrived, record)
    return pairs[:count]


@kernel
def _release(tolerance: int, mark: int, left: Held, right: Held, pairs: Ints, count: int) -> tuple[Ints, int]:
    """Adds the left events that the right side's watermark has passed, by time and then by arrival."""
    while left.fill[WAITING] > 0 and left.heap[0, 0] < mark:
        row = pop(left)
        left.rows[row, MATCHED] = 1
        pairs = with_room(pairs, count)
        pairs[count, 0] = row
        pairs[count, 1] = _as_of(right, left.rows[row, KEY], left.rows[row, TIME], tolerance)
        count += 1
    return pairs, count


@kernel
def _as_of(right: Held, key: int, time: int, tolerance: int) -> int:
    """The last row of a key that is not later than a time and not older than the tolerance, or none."""
    at = right.newest[key]
    while at != NO_ROW and right.rows[at, TIME] > time:
        at = right.rows[at, OLDER]
    return at if at != NO_ROW and right.rows[at, TIME] + tolerance >= time else NO_ROW


@kernel
def _latest(right: Held, key: int, horizon: int) -> int:
    """The time of the last row of a key that is not after the horizon, -NEVER_US where there is none."""
    at = right.newest[key]
    while at != NO_ROW and right.rows[at, TIME] > horizon:
        at = right.rows[at, OLDER]
    return right.rows[at, TIME] if at != NO_ROW else -NEVER_US


@kernel
def _is_known(right: Held, key: int, time: int, tolerance: int, horizon: int) -> bool:
    """Whether the right row at a time before the horizon must still be there, if there was one."""
    latest = _latest(right, key, horizon)
    if latest == -NEVER_US or latest + tolerance < horizon:
        return tolerance == NEVER_US
    return latest <= time


@kernel
def _still_valid(right: Held, count: int, tolerance: int, horizon: int) -> Bools:
    """Which rows come after the horizon or are the last before it."""
    kept = np.zeros(count, dtype=np.bool_)
    for key in range(len(right.newest)):
        at = right.newest[key]
        while at != NO_ROW:
            time = right.rows[at, TIME]
            kept[at] = time + tolerance >= horizon
            if time <= horizon:
                break
            at = right.rows[at, OLDER]
    return kept
