"""Partial aggregates: what a pane, a session or a list of events keeps for each column so that it can be merged.

A frame (`windows`, `sessions`, `last_events`) holds cells of float64; the operations here fill, merge and read them.
The count comes first for every column. Variance is kept as mean and sum of squared distances (Welford; merged as in
Chan et al. 1979), first and last with their event time, sketches as the number of their block in `Pools`.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from streaming import sketches
from streaming.compile_kernels import kernel
from streaming.plan import Aggregate
from streaming.records import Bools, Floats, Ints
from streaming.sketches import Pools

COUNT, SUM, MIN, MAX, MOMENTS, FIRST, LAST, DECAYED, DISTINCT, QUANTILES, TOP = range(11)

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


class Operations(NamedTuple):
    """The F operations of a frame, those of one column side by side, as arrays for kernels.

    Attributes:
        codes: [F] COUNT, SUM, ...
        columns: [F] the column of the plan.
        cells: [F] the first cell in a pane.
        counts: [F] the cell with the count of its column.
        half_lives: [F] microseconds, for DECAYED.
        sketch_kinds: [F] kind of the pool, -1 where the operation has none.
        ranges: [C, 2] first and last + 1 operation of each column of the frame.
    """

    codes: Ints
    columns: Ints
    cells: Ints
    counts: Ints
    half_lives: Floats
    sketch_kinds: Ints
    ranges: Ints


class Layout(NamedTuple):
    """What the panes of a frame hold.

    Attributes:
        operations: What fills them.
        size: Cells a pane.
        columns: The columns of the plan in the order of `operations.ranges`.
        blocks: How many blocks of each kind of sketch one event can need.
        top_k: The largest k of a top_k.
    """

    operations: Operations
    size: int
    columns: tuple[int, ...]
    blocks: tuple[int, int, int]
    top_k: int

    def at(self, column: int, aggregate: Aggregate) -> tuple[int, int]:
        """The first cells of a column's count and of the operation behind an aggregate of it."""
        operations = self.operations
        code, half_life = operation(aggregate)
        for number in range(len(operations.codes)):
            same = operations.columns[number] == column and operations.codes[number] == code
            if same and operations.half_lives[number] == half_life:
                return int(operations.counts[number]), int(operations.cells[number])
        raise KeyError(aggregate.name)

    def range_of(self, column: int) -> tuple[int, int]:
        """The first and last + 1 operation of a column of the plan."""
        first, end = self.operations.ranges[self.columns.index(column)]
        return int(first), int(end)


def operation(aggregate: Aggregate) -> tuple[int, float]:
    """Which operation an aggregate reads, and its half-life in microseconds (0 where it has none)."""
    if aggregate.quantile is not None:
        return QUANTILES, 0.0
    if aggregate.top is not None:
        return TOP, 0.0
    code = _OPERATIONS[aggregate.function]
    return code, float(aggregate.window_us) if code == DECAYED else 0.0


def layout(needs: Iterable[tuple[int, Aggregate]]) -> Layout:
    """The layout for aggregates, each with its column of the plan."""
    wanted: dict[int, set[tuple[int, float]]] = {}
    top_k = 1
    for column, aggregate in needs:
        wanted.setdefault(column, {(COUNT, 0.0)}).add(operation(aggregate))
        top_k = max(top_k, aggregate.top or 1)
    rows: list[tuple[int, int, int, int, float, int]] = []
    ranges, cell = [], 0
    blocks = [0, 0, 0]
    for column in sorted(wanted):
        first, count = len(rows), cell
        for code, half_life in sorted(wanted[column]):
            kind = _SKETCH_KINDS.get(code, -1)
            if kind >= 0:
                blocks[kind] += 1
            rows.append((code, column, cell, count, half_life, kind))
            cell += _CELLS[code]
        ranges.append((first, len(rows)))
    codes, columns, cells, counts, half_lives, kinds = zip(*rows, strict=True)
    operations = Operations(
        codes=_integers(codes),
        columns=_integers(columns),
        cells=_integers(cells),
        counts=_integers(counts),
        half_lives=np.array(half_lives),
        sketch_kinds=_integers(kinds),
        ranges=_integers(ranges),
    )
    return Layout(operations, cell, tuple(sorted(wanted)), (blocks[0], blocks[1], blocks[2]), top_k)


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


def _integers(values: Sequence[int] | Sequence[tuple[int, int]]) -> Ints:
    return np.array(values, dtype=np.int64)


@kernel
def update(
    cells: Floats, base: int, operations: Operations, pools: Pools, time_us: int, values: Floats, present: Bools
) -> None:
    """Adds one event's values [C] where they are present to the cells from `base`."""
    codes, columns, offsets = operations.codes, operations.columns, operations.cells
    for number in range(len(codes)):
        column = columns[number]
        if not present[column]:
            continue
        value, code, at = values[column], codes[number], base + offsets[number]
        if code == COUNT:
            cells[at] += 1.0
        elif code == SUM:
            cells[at] += value
        else:
            count = cells[base + operations.counts[number]]
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
                _decay(cells, at, count, operations.half_lives[number], time_us, value)
            else:
                kind = operations.sketch_kinds[number]
                if cells[at] == 0.0:
                    cells[at] = sketches.take_block(pools, kind)
                sketches.add_to_sketch(pools, kind, int(cells[at]), value)


@kernel
def _decay(cells: Floats, at: int, count: float, half_life_us: float, time_us: int, value: float) -> None:
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
def combine(
    into: Floats, into_base: int, cells: Floats, base: int, operations: Operations, first: int, end: int, shift: int
) -> None:
    """Merges the operations `first` to `end` of one pane into others, whose events came before it.

    `shift` is subtracted from the cells' places in `into`. Sketches are left alone.
    """
    count_at = operations.counts[first]
    more = cells[base + count_at]
    if more == 0.0:
        return
    count = into[into_base + count_at - shift]
    for number in range(first, end):
        at = base + operations.cells[number]
        to = into_base + operations.cells[number] - shift
        code = operations.codes[number]
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
def combine_sketches(cells: Floats, into: int, base: int, operations: Operations, pools: Pools) -> None:
    """Merges the sketches of the cells from `base` into those before them; their blocks go over or back."""
    for number in range(len(operations.codes)):
        kind = operations.sketch_kinds[number]
        at, to = base + operations.cells[number], into + operations.cells[number]
        if kind < 0 or cells[at] == 0.0:
            continue
        if cells[to] == 0.0:
            cells[to] = cells[at]
        else:
            sketches.merge_sketches(pools, kind, int(cells[to]), int(cells[at]))
            sketches.give_block(pools, kind, int(cells[at]))
        cells[at] = 0.0


@kernel
def clear(cells: Floats, base: int, size: int, operations: Operations, pools: Pools, has_sketches: bool) -> None:
    """Empties the cells from `base`, giving their blocks back."""
    if has_sketches:
        for number in range(len(operations.codes)):
            kind, at = operations.sketch_kinds[number], base + operations.cells[number]
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
