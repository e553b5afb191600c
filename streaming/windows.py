"""Time windows in panes: one partial aggregate per entity, column and slide, windows as merges of panes.

All windows of one slide share a ring of panes as wide as the slide. A pane is filled in offset order and panes are
merged from the oldest on, each window for itself and never by subtraction, so that results do not depend on how the
records were batched. A lifetime is a window of one pane that never ends.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from streaming import partials
from streaming.cells import Cells, grown
from streaming.compile_kernels import kernel
from streaming.memory import address, prefetch
from streaming.partials import CELL, COUNT_CELL, SKETCH, Estimates
from streaming.plan import Aggregate
from streaming.records import Bools, Floats, Ints
from streaming.sketches import Pools

NEVER_US = 1 << 62

_NO_PANE = -(1 << 62)
_AHEAD = 16


class Reading(NamedTuple):
    """Where an aggregate finds its values in the output of `merge`: the column of its count and that of itself."""

    counts: int
    values: int


class Outputs(NamedTuple):
    """What merged windows give: simple operations as cells, then what is read from sketches.

    Attributes:
        windows: [W, 4] first and last + 1 operation, panes, first column of the output.
        estimates: What is read from sketches.
        width: Columns of the output.
        readings: For each aggregate.
    """

    windows: Ints
    estimates: Estimates
    width: int
    readings: tuple[Reading, ...]


def outputs(layout: partials.Layout, needs: Sequence[tuple[int, Aggregate]], panes: Sequence[int]) -> Outputs:
    """The outputs for aggregates, each with its column of the plan and its panes; equal windows are shared."""
    windows: dict[tuple[int, int], tuple[int, int, int, int]] = {}
    width = 0
    for (column, _), length in zip(needs, panes, strict=True):
        if (column, length) not in windows:
            first, end = layout.ranges[column]
            windows[column, length] = (first, end, length, width)
            width += _cells(layout, first, end)
    readings, rows = [], []
    for (column, aggregate), length in zip(needs, panes, strict=True):
        first, _, _, out = windows[column, length]
        count, cell = layout.at(column, aggregate)
        if aggregate.quantile is None and aggregate.top is None and aggregate.function != "count_distinct":
            readings.append(Reading(out, out + cell - count))
            continue
        number = int(np.flatnonzero(layout.operations[:, CELL] == cell)[0])
        rows.append((number, list(windows).index((column, length)), aggregate.quantile or 0.0, width))
        readings.append(Reading(out, width))
        width += aggregate.top or 1
    return Outputs(np.array(list(windows.values())), partials.estimates(rows), width, tuple(readings))


def _cells(layout: partials.Layout, first: int, end: int) -> int:
    starts = [*layout.operations[:, CELL].tolist(), layout.size]
    return int(starts[end] - starts[first])


class PaneRing:
    """The panes of one slide: an array [K, P * S] over entities, a ring of P panes and their S cells.

    Pane p covers [p * slide, (p + 1) * slide) of event time and lies at p modulo P; `newest` holds an entity's highest
    p so far, and whatever lies more than P - 1 below it is gone.

    Args:
        aggregates: Those of one slide, each with its column of the plan; lifetime ones have slide 0.
        lateness_us: For how long after the watermark a pane still takes events.
        history_us: How far the moments of `merge` may lie behind the newest event.
        final: Moments of `merge` are ends of windows that do not hold the pane that starts there.
    """

    def __init__(
        self, aggregates: Sequence[tuple[int, Aggregate]], lateness_us: int, history_us: int, final: bool
    ) -> None:
        self.slide_us = aggregates[0][1].slide_us
        self._lateness_us = lateness_us
        self._shift = int(final)
        lengths = [aggregate.window_us // self.slide_us if self.slide_us else 1 for _, aggregate in aggregates]
        self._size = max(lengths) + (-(-history_us // self.slide_us) + self._shift if self.slide_us else 0)
        self._cells = Cells(aggregates, self._size)
        self._newest = np.zeros(0, dtype=np.int64)
        self._outputs = outputs(self._cells.layout, aggregates, lengths)
        self.readings = self._outputs.readings

    @property
    def incremental(self) -> bool:
        """Whether the rows of an entity are its whole state, which sketches in pools are not."""
        return not self._cells.has_sketches

    def reserve(self, keys: int) -> None:
        """Makes room for `keys` entities; arrays grow by doubling."""
        if keys > len(self._newest):
            keys = max(keys, 2 * len(self._newest))
            self._newest = grown(self._newest, keys, _NO_PANE)
            self._cells.reserve(keys)

    def bytes_per_key(self) -> int:
        """Memory that one entity takes, sketches not counted."""
        return 8 + self._cells.bytes_per_key

    def pool_bytes(self) -> int:
        """Memory of the sketches."""
        return self._cells.pool_bytes

    def closed(self, times: Ints, marks: Ints) -> Bools:
        """Which events [N] come after the pane that they belong to is closed."""
        if not self.slide_us:
            return np.zeros(len(times), dtype=np.bool_)
        closed: Bools = (times // self.slide_us + 1) * self.slide_us + self._lateness_us <= marks
        return closed

    def add(self, ids: Ints, times: Ints, marks: Ints, values: Floats, present: Bools, due_us: Ints) -> None:
        """Adds N events in order, but for those of id -1 and those whose pane the watermark [N] has closed.

        For final windows `due_us` [K] becomes at most the end of each event's pane.
        """
        cells, layout = self._cells, self._cells.layout
        cells.reserve_sketches(len(ids))
        _add(
            ids,
            times,
            marks - self._lateness_us,
            values,
            present,
            self.slide_us,
            self._size,
            layout.size,
            layout.operations,
            cells.has_sketches,
            cells.pools,
            self._newest,
            cells.array,
            due_us[: self._shift * len(due_us)],
        )

    def merge(self, ids: Ints, moments_us: Ints, due_us: Ints) -> Floats:
        """The outputs [M, O] of the windows that hold at a moment [M] each; lowers `due_us` of these entities.

        `due_us` [K] becomes at most the next moment at which one of the windows gains or loses a pane.
        """
        out = np.zeros((len(ids), self._outputs.width))
        currents = moments_us // self.slide_us - self._shift if self.slide_us else np.zeros_like(moments_us)
        cells, wanted = self._cells, self._outputs
        arguments = (ids, currents, wanted.windows, self._size, cells.layout.size, cells.layout.operations)
        _merge(*arguments, self.slide_us, self._shift, self._newest, cells.array, due_us, out)
        if len(wanted.estimates.outs):
            _estimate(*arguments, wanted.estimates, cells.pools, self._newest, cells.array, out)
        return out

    def empty(self, keys: int, mark_us: int) -> Bools:
        """Which of the first `keys` entities hold nothing that a window from this watermark on could read."""
        if not self.slide_us:
            empty: Bools = self._newest[:keys] == _NO_PANE
        else:
            empty = self._newest[:keys] + self._size < mark_us // self.slide_us
        return empty

    def keep(self, ids: Ints) -> None:
        """Forgets all entities but those of `ids`, which become 0, 1, ... in this order."""
        self._newest = self._newest[ids]
        self._cells.keep(ids)

    def state(self, ids: Ints | slice) -> list[npt.NDArray[Any]]:
        """The arrays of some entities, and of the sketches where there are any, for `restore`."""
        return [self._newest[ids], *self._cells.state(ids)]

    def restore(self, ids: Ints | slice, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Takes the arrays of `state` for these entities, for which there is room; they are copied."""
        self._newest[ids] = arrays[0]
        self._cells.restore(ids, arrays[1:])


@kernel
def _add(
    ids: Ints,
    times: Ints,
    closed_us: Ints,
    values: Floats,
    present: Bools,
    slide_us: int,
    panes: int,
    size: int,
    operations: Ints,
    has_sketches: bool,
    pools: Pools,
    newest: Ints,
    cells: Floats,
    due_us: Ints,
) -> None:
    start, end, pane, slot = 0, 0, 0, 0
    if slide_us == 0:
        start, end = -NEVER_US, NEVER_US
    newest_base, cells_base = address(newest), address(cells)
    for row in range(len(ids)):
        if row + 2 * _AHEAD < len(ids):
            prefetch(newest_base + 8 * ids[row + 2 * _AHEAD])
            prefetch(cells_base + 8 * (ids[row + _AHEAD] * panes + slot) * size)
            prefetch(cells_base + 8 * (ids[row + _AHEAD] * panes + slot) * size + 64)
        key, time = ids[row], times[row]
        if key < 0:
            continue
        if not start <= time < end:
            pane = time // slide_us
            slot = pane % panes
            start = pane * slide_us
            end = start + slide_us
        if end <= closed_us[row] or pane <= newest[key] - panes:
            continue
        if pane > newest[key]:
            cleared = slot
            for _ in range(min(pane - newest[key], panes)):
                partials.clear(cells, (key * panes + cleared) * size, size, operations, pools, has_sketches)
                cleared = cleared - 1 if cleared > 0 else panes - 1
            newest[key] = pane
        base = (key * panes + slot) * size
        partials.update(cells, base, operations, time, values, present, row)
        if has_sketches:
            partials.update_sketches(cells, base, operations, pools, values, present, row)
        if len(due_us) and partials.any_present(operations, present, row):
            due_us[key] = min(due_us[key], end)


@kernel
def _merge(
    ids: Ints,
    currents: Ints,
    windows: Ints,
    panes: int,
    size: int,
    operations: Ints,
    slide_us: int,
    shift: int,
    newest: Ints,
    cells: Floats,
    due_us: Ints,
    out: Floats,
) -> None:
    flat = out.reshape(-1)
    for row in range(len(ids)):
        key, current = ids[row], currents[row]
        change = NEVER_US
        for window in range(len(windows)):
            first_operation, end_operation, length = windows[window, 0], windows[window, 1], windows[window, 2]
            count_at = operations[first_operation, COUNT_CELL]
            to = row * out.shape[1] + windows[window, 3] + count_at
            first = max(current - length, newest[key] - panes) + 1
            slot = first % panes
            found = False
            for pane in range(first, newest[key] + 1):
                base = (key * panes + slot) * size
                slot = slot + 1 if slot + 1 < panes else 0
                if cells[base + count_at] == 0.0:
                    continue
                if pane > current:
                    change = min(change, pane)
                    break
                partials.combine(flat, to - count_at, cells, base, operations, first_operation, end_operation, count_at)
                if not found:
                    found = True
                    change = min(change, pane + length)
        if change < NEVER_US and slide_us > 0:
            due_us[key] = min(due_us[key], (change + shift) * slide_us)


@kernel
def _estimate(
    ids: Ints,
    currents: Ints,
    windows: Ints,
    panes: int,
    size: int,
    operations: Ints,
    estimates: Estimates,
    pools: Pools,
    newest: Ints,
    cells: Floats,
    out: Floats,
) -> None:
    blocks = np.empty(panes, dtype=np.int64)
    ends = np.append(estimates.outs[1:], out.shape[1])
    for row in range(len(ids)):
        key, current = ids[row], currents[row]
        for number in range(len(estimates.outs)):
            window, operation = estimates.windows[number], estimates.operations[number]
            found = 0
            first = max(current - windows[window, 2], newest[key] - panes) + 1
            for pane in range(first, min(current, newest[key]) + 1):
                block = int(cells[(key * panes + pane % panes) * size + operations[operation, CELL]])
                if block > 0:
                    blocks[found] = block
                    found += 1
            kind = operations[operation, SKETCH]
            to = out[row, estimates.outs[number] : ends[number]]
            partials.estimate(pools, kind, blocks[:found], estimates.quantiles[number], to)
