"""Partial aggregates: what a pane, a session or a list of events keeps for each column so that it can be merged.

A frame (`windows`, `sessions`, `last_events`) holds cells of float64; the operations here fill, merge and read them.
The count comes first for every column. Variance is kept as mean and sum of squared distances (Welford; merged as in
Chan et al. 1979), first and last with their event time, sketches as the number of their block in `Pools`.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from streaming import sketches
from streaming.compile_kernels import inlined, kernel
from streaming.plan import Aggregate
from streaming.records import Bools, Floats, Ints
from streaming.sketches import Pools

COUNT, SUM, MIN, MAX, MOMENTS, FIRST, LAST, DECAYED, DISTINCT, QUANTILES, TOP = range(11)

# The operations of a frame are an array [F, 6], those of one column side by side: what it is, the column of the plan,
# its first cell in a pane, the cell with the count of its column, the kind of its sketch or -1, its half-life.
# (One array: taking an array out of a tuple costs a kernel more than reading it.)
CODE, COLUMN, CELL, COUNT_CELL, SKETCH, HALF_LIFE_US = range(6)

_CELLS = {
    COUNT: 1,
    SUM: 1,
    MIN: 1,
    MAX: 1,
    MOMENTS: 2,
    FIRST: 2,
    LAST: 2,
    DECAYED: 3,
    DISTINCT: 1,
    QUANTILES: 1,
    TOP: 1,
}
_OPERATIONS = {
    "count": COUNT,
    "sum": SUM,
    "mean": SUM,
    "min": MIN,
    "max": MAX,
    "std": MOMENTS,
    "var": MOMENTS,
    "first": FIRST,
    "last": LAST,
    "decayed_mean": DECAYED,
    "count_distinct": DISTINCT,
}
_SKETCH_KINDS = {DISTINCT: sketches.HLL, QUANTILES: sketches.DIGEST, TOP: sketches.TOP}


class Layout(NamedTuple):
    """What the panes of a frame hold.

    Attributes:
        operations: [F, 6] what fills them.
        ranges: The first and last + 1 operation of each column of the plan.
        size: Cells a pane.
        blocks: How many blocks of each kind of sketch one event can need.
        top_k: The largest k of a top_k.
    """

    operations: Ints
    ranges: dict[int, tuple[int, int]]
    size: int
    blocks: tuple[int, int, int]
    top_k: int

    def at(self, column: int, aggregate: Aggregate) -> tuple[int, int]:
        """The first cells of a column's count and of the operation behind an aggregate of it."""
        wanted = operation(aggregate)
        for row in self.operations.tolist():
            if row[COLUMN] == column and (row[CODE], row[HALF_LIFE_US]) == wanted:
                return row[COUNT_CELL], row[CELL]
        raise KeyError(aggregate.name)


def operation(aggregate: Aggregate) -> tuple[int, int]:
    """Which operation an aggregate reads, and its half-life in microseconds (0 where it has none)."""
    if aggregate.quantile is not None:
        return QUANTILES, 0
    if aggregate.top is not None:
        return TOP, 0
    code = _OPERATIONS[aggregate.function]
    return code, aggregate.window_us if code == DECAYED else 0


def layout(needs: Iterable[tuple[int, Aggregate]]) -> Layout:
    """The layout for aggregates, each with its column of the plan."""
    wanted: dict[int, set[tuple[int, int]]] = {}
    top_k = 1
    for column, aggregate in needs:
        wanted.setdefault(column, {(COUNT, 0)}).add(operation(aggregate))
        top_k = max(top_k, aggregate.top or 1)
    rows: list[tuple[int, ...]] = []
    ranges, cell = {}, 0
    blocks = [0, 0, 0]
    for column in sorted(wanted):
        first, count = len(rows), cell
        for code, half_life_us in sorted(wanted[column]):
            kind = _SKETCH_KINDS.get(code, -1)
            if kind >= 0:
                blocks[kind] += 1
            rows.append((code, column, cell, count, kind, half_life_us))
            cell += _CELLS[code]
        ranges[column] = (first, len(rows))
    return Layout(np.array(rows, dtype=np.int64), ranges, cell, (blocks[0], blocks[1], blocks[2]), top_k)


class Estimates(NamedTuple):
    """What is read from sketches of merged windows, as arrays for kernels.

    Attributes:
        operations: [E] number of the operation.
        windows: [E] number of the window.
        quantiles: [E] the quantile, or how many of the most frequent values.
        outs: [E] the first column of the output.
    """

    operations: Ints
    windows: Ints
    quantiles: Floats
    outs: Ints


def estimates(rows: Sequence[tuple[int, int, float, int]]) -> Estimates:
    """The arrays for (operation, window, quantile or k, output column)."""
    operations, windows, quantiles, outs = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Estimates(_integers(operations), _integers(windows), np.array(quantiles, dtype=np.float64), _integers(outs))


def _integers(values: Sequence[int]) -> Ints:
    return np.array(values, dtype=np.int64)


@inlined
def update(cells: Floats, base: int, operations: Ints, time_us: int, values: Floats, present: Bools, row: int) -> None:
    """Adds the values [N, C] of one row, where they are present, to the cells from `base`; sketches are left alone.

    Rows are read by number, since a view of one costs more than all the rest.
    """
    for number in range(len(operations)):
        column = operations[number, COLUMN]
        if not present[row, column]:
            continue
        value, code, at = values[row, column], operations[number, CODE], base + operations[number, CELL]
        if code == COUNT:
            cells[at] += 1.0
        elif code == SUM:
            cells[at] += value
        else:
            count = cells[base + operations[number, COUNT_CELL]]
            if code == MIN:
                if count == 1.0 or value < cells[at]:
                    cells[at] = value
            elif code == MAX:
                if count == 1.0 or value > cells[at]:
                    cells[at] = value
            elif code == MOMENTS:
                difference = value - cells[at]
                cells[at] += difference / count
                cells[at + 1] += difference * (value - cells[at])
            elif code == FIRST:
                if count == 1.0 or time_us < cells[at]:
                    cells[at], cells[at + 1] = time_us, value
            elif code == LAST:
                if count == 1.0 or time_us >= cells[at]:
                    cells[at], cells[at + 1] = time_us, value
            elif code == DECAYED:
                _decay(cells, at, count, operations[number, HALF_LIFE_US], time_us, value)


@kernel
def _decay(cells: Floats, at: int, count: float, half_life_us: int, time_us: int, value: float) -> None:
    """Weights halve every half-life: cells are the weighted sum and the weight at the newest time, and that time."""
    if count == 1.0:
        cells[at], cells[at + 1], cells[at + 2] = value, 1.0, time_us
        return
    age = (time_us - cells[at + 2]) / half_life_us
    if age >= 0.0:
        factor = np.exp2(-age)
        cells[at], cells[at + 1] = cells[at] * factor + value, cells[at + 1] * factor + 1.0
        cells[at + 2] = time_us
    else:
        factor = np.exp2(age)
        cells[at], cells[at + 1] = cells[at] + value * factor, cells[at + 1] + factor


@kernel
def any_present(operations: Ints, present: Bools, row: int) -> bool:
    """Whether a row of values [N, C] has one for any operation, without which it changes nothing."""
    for number in range(len(operations)):
        if present[row, operations[number, COLUMN]]:
            return True
    return False


@kernel
def update_sketches(
    cells: Floats, base: int, operations: Ints, pools: Pools, values: Floats, present: Bools, row: int
) -> None:
    """Adds the values [N, C] of one row, where they are present, to the sketches of the cells from `base`."""
    for number in range(len(operations)):
        kind, column = operations[number, SKETCH], operations[number, COLUMN]
        if kind >= 0 and present[row, column]:
            at = base + operations[number, CELL]
            if cells[at] == 0.0:
                cells[at] = sketches.take_block(pools, kind)
            sketches.add_to_sketch(pools, kind, int(cells[at]), values[row, column])


@kernel
def combine(
    into: Floats, into_base: int, cells: Floats, base: int, operations: Ints, first: int, end: int, shift: int
) -> None:
    """Merges the operations `first` to `end` of one pane into others, whose events came before it.

    `shift` is subtracted from the cells' places in `into`. Sketches are left alone.
    """
    count_at = operations[first, COUNT_CELL]
    more = cells[base + count_at]
    if more == 0.0:
        return
    count = into[into_base + count_at - shift]
    for number in range(first, end):
        at = base + operations[number, CELL]
        to = into_base + operations[number, CELL] - shift
        code = operations[number, CODE]
        if code == COUNT or code == SUM:
            into[to] += cells[at]
        elif code == MIN:
            if count == 0.0 or cells[at] < into[to]:
                into[to] = cells[at]
        elif code == MAX:
            if count == 0.0 or cells[at] > into[to]:
                into[to] = cells[at]
        elif code == MOMENTS:
            if count == 0.0:
                into[to], into[to + 1] = cells[at], cells[at + 1]
            else:
                difference = cells[at] - into[to]
                into[to] += difference * more / (count + more)
                into[to + 1] += cells[at + 1] + difference * difference * count * more / (count + more)
        elif code == FIRST:
            if count == 0.0 or cells[at] < into[to]:
                into[to], into[to + 1] = cells[at], cells[at + 1]
        elif code == LAST:
            if count == 0.0 or cells[at] >= into[to]:
                into[to], into[to + 1] = cells[at], cells[at + 1]
        elif code == DECAYED:
            into[to], into[to + 1], into[to + 2] = cells[at], cells[at + 1], cells[at + 2]


@kernel
def combine_sketches(cells: Floats, into: int, base: int, operations: Ints, pools: Pools) -> None:
    """Merges the sketches of the cells from `base` into those before them; their blocks go over or back."""
    for number in range(len(operations)):
        kind = operations[number, SKETCH]
        at, to = base + operations[number, CELL], into + operations[number, CELL]
        if kind < 0 or cells[at] == 0.0:
            continue
        if cells[to] == 0.0:
            cells[to] = cells[at]
        else:
            sketches.merge_sketches(pools, kind, int(cells[to]), int(cells[at]))
            sketches.give_block(pools, kind, int(cells[at]))
        cells[at] = 0.0


@kernel
def clear(cells: Floats, base: int, size: int, operations: Ints, pools: Pools, has_sketches: bool) -> None:
    """Empties the cells from `base`, giving their blocks back."""
    if has_sketches:
        for number in range(len(operations)):
            kind, at = operations[number, SKETCH], base + operations[number, CELL]
            if kind >= 0 and cells[at] != 0.0:
                sketches.give_block(pools, kind, int(cells[at]))
    for at in range(base, base + size):
        cells[at] = 0.0


@kernel
def estimate(pools: Pools, kind: int, blocks: Ints, quantile_or_k: float, out: Floats) -> None:
    """Writes what some blocks of one sketch, merged, say; NaN where there is none. `out` is [k] of top_k, else [1]."""
    out[:] = np.nan
    if len(blocks) == 0:
        return
    if kind == sketches.HLL:
        sketches.clear_block(pools, kind, 0)
        for block in blocks:
            sketches.hll_merge(pools.hll, 0, block)
        out[0] = sketches.hll_estimate(pools.hll, 0)
    elif kind == sketches.DIGEST:
        room = sketches.digest_room(len(blocks))
        means, weights = np.empty(room), np.empty(room)
        count, lowest, highest = 0, np.inf, -np.inf
        for block in blocks:
            count = sketches.digest_gather(pools.digest, block, means, weights, count)
            low, high = sketches.digest_bounds(pools.digest, block)
            lowest, highest = min(lowest, low), max(highest, high)
        order = np.argsort(means[:count], kind="mergesort")
        out[0] = sketches.quantile(quantile_or_k, means, weights, order, lowest, highest)
    else:
        room = len(blocks) * (pools.top.shape[1] // 2)
        values, counts = np.empty(room), np.empty(room)
        count = 0
        for block in blocks:
            count = sketches.top_gather(pools.top, block, values, counts, count)
        sketches.top_write(values, counts, count, out)
