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
    """The panes of one slide: of each entity a ring of P panes, with the number of each [K, P] and its cells [P, K, S].

    Pane p covers [p * slide, (p + 1) * slide) of event time and lies at p modulo P, in the place of the one before it
    there; a pane that lies more than P - 1 below an entity's highest is read no more.

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
        self._panes = np.zeros((0, self._size), dtype=np.int64)
        self._outputs = outputs(self._cells.layout, aggregates, lengths)
        self.readings = self._outputs.readings

    def reserve(self, keys: int) -> None:
        """Makes room for `keys` entities; arrays grow by doubling."""
        if keys > len(self._panes):
            keys = max(keys, 2 * len(self._panes))
            self._panes = grown(self._panes, keys, _NO_PANE)
            self._cells.reserve(keys)

    def bytes_per_key(self) -> int:
        """Memory that one entity takes, sketches not counted."""
        return 8 * self._size + self._cells.bytes_per_key

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
            layout.operations,
            cells.has_sketches,
            cells.pools,
            self._panes,
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
        arguments = (ids, currents, wanted.windows, cells.layout.operations, self._panes, cells.array)
        _merge(*arguments, self.slide_us, self._shift, due_us, out)
        if len(wanted.estimates.outs):
            _estimate(*arguments, wanted.estimates, cells.pools, out)
        return out

    def empty(self, keys: int, mark_us: int) -> Bools:
        """Which of the first `keys` entities hold nothing that a window from this watermark on could read."""
        oldest = mark_us // self.slide_us - self._size if self.slide_us else 0
        return _empty(self._panes[:keys], oldest)

    def keep(self, ids: Ints) -> None:
        """Forgets all entities but those of `ids`, which become 0, 1, ... in this order."""
        self._panes = self._panes[ids]
        self._cells.keep(ids)

    def state(self, ids: Ints) -> list[npt.NDArray[Any]]:
        """What some entities hold, with their sketches, for `restore`."""
        held = _held(self._panes, ids)
        panes = [self._panes[ids[rows], slot] for slot, rows in enumerate(held)]
        return [np.packbits(held), np.concatenate(panes), *self._cells.state(ids, held)]

    def restore(self, ids: Ints, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Takes the arrays of `state` for these entities, for which there is room; they are copied."""
        held = np.unpackbits(arrays[0], count=len(ids) * self._size).view(np.bool_).reshape(self._size, -1)
        self._panes[ids] = _NO_PANE
        start = 0
        for slot, rows in enumerate(held):
            end = start + int(rows.sum())
            self._panes[ids[rows], slot] = arrays[1][start:end]
            start = end
        self._cells.restore(ids, held, arrays[2:])


@kernel
def _add(
    ids: Ints,
    times: Ints,
    closed_us: Ints,
    values: Floats,
    present: Bools,
    slide_us: int,
    operations: Ints,
    has_sketches: bool,
    pools: Pools,
    panes: Ints,
    cells: Floats,
    due_us: Ints,
) -> None:
    slots, keys, size = cells.shape
    flat = cells.reshape(-1)
    start, end, pane, slot = 0, 0, 0, 0
    if slide_us == 0:
        start, end = -NEVER_US, NEVER_US
    panes_base, cells_base = address(panes), address(cells)
    for row in range(len(ids)):
        if row + _AHEAD < len(ids):
            # Most events lie in the same pane as the one before them.
            ahead = ids[row + _AHEAD]
            prefetch(panes_base + 8 * (ahead * slots + slot))
            prefetch(cells_base + 8 * (slot * keys + ahead) * size)
            prefetch(cells_base + 8 * (slot * keys + ahead) * size + 64)
        key, time = ids[row], times[row]
        if key < 0:
            continue
        if not start <= time < end:
            pane = time // slide_us
            slot = pane % slots
            start = pane * slide_us
            end = start + slide_us
        if end <= closed_us[row] or panes[key, slot] > pane:
            continue
        base = (slot * keys + key) * size
        if panes[key, slot] < pane:
            if has_sketches and not _make_way(key, pane, operations, pools, panes, cells):
                continue
            panes[key, slot] = pane
            for cell in range(base, base + size):
                flat[cell] = 0.0
        partials.update(flat, base, operations, time, values, present, row)
        if has_sketches:
            partials.update_sketches(flat, base, operations, pools, values, present, row)
        if len(due_us) and partials.any_present(operations, present, row):
            due_us[key] = min(due_us[key], end)


@kernel
def _make_way(key: int, pane: int, operations: Ints, pools: Pools, panes: Ints, cells: Floats) -> bool:
    """Gives back the sketches of the panes that a new one is the end of; False if it is too old itself."""
    slots, keys, size = cells.shape
    for slot in range(slots):
        if panes[key, slot] - slots >= pane:
            return False
        if _NO_PANE < panes[key, slot] <= pane - slots:
            panes[key, slot] = _NO_PANE
            partials.clear(cells.reshape(-1), (slot * keys + key) * size, size, operations, pools, True)
    return True


@kernel
def _merge(
    ids: Ints,
    currents: Ints,
    windows: Ints,
    operations: Ints,
    panes: Ints,
    cells: Floats,
    slide_us: int,
    shift: int,
    due_us: Ints,
    out: Floats,
) -> None:
    slots, keys, size = cells.shape
    flat, flat_out = cells.reshape(-1), out.reshape(-1)
    longest = windows[:, 2].max()
    held, bases = np.empty(slots, dtype=np.int64), np.empty(slots, dtype=np.int64)
    panes_base = address(panes)
    for row in range(len(ids)):
        if row + _AHEAD < len(ids):
            for line in range(0, slots, 8):
                prefetch(panes_base + 8 * (ids[row + _AHEAD] * slots + line))
        key, current = ids[row], currents[row]
        found = 0
        pane = current - longest + 1
        slot = pane % slots
        for _ in range(slots):
            if panes[key, slot] >= pane:
                held[found], bases[found] = panes[key, slot], (slot * keys + key) * size
                prefetch(address(cells) + 8 * bases[found])
                found += 1
            pane += 1
            slot = slot + 1 if slot + 1 < slots else 0
        change = NEVER_US
        for window in range(len(windows)):
            first_operation, end_operation, length = windows[window, 0], windows[window, 1], windows[window, 2]
            count_at = operations[first_operation, COUNT_CELL]
            to = row * out.shape[1] + windows[window, 3]
            any_found = False
            for number in range(found):
                base = bases[number]
                if held[number] <= current - length or flat[base + count_at] == 0.0:
                    continue
                if held[number] > current:
                    change = min(change, held[number])
                    continue
                partials.combine(flat_out, to, flat, base, operations, first_operation, end_operation, count_at)
                if not any_found:
                    any_found = True
                    change = min(change, held[number] + length)
        if change < NEVER_US and slide_us > 0:
            due_us[key] = min(due_us[key], (change + shift) * slide_us)


@kernel
def _estimate(
    ids: Ints,
    currents: Ints,
    windows: Ints,
    operations: Ints,
    panes: Ints,
    cells: Floats,
    estimates: Estimates,
    pools: Pools,
    out: Floats,
) -> None:
    slots = panes.shape[1]
    blocks = np.empty(slots, dtype=np.int64)
    ends = np.append(estimates.outs[1:], out.shape[1])
    for row in range(len(ids)):
        key, current = ids[row], currents[row]
        for number in range(len(estimates.outs)):
            window, operation = estimates.windows[number], estimates.operations[number]
            found = 0
            for pane in range(current - windows[window, 2] + 1, current + 1):
                slot = pane % slots
                if panes[key, slot] != pane:
                    continue
                block = int(cells[slot, key, operations[operation, CELL]])
                if block > 0:
                    blocks[found] = block
                    found += 1
            kind = operations[operation, SKETCH]
            to = out[row, estimates.outs[number] : ends[number]]
            partials.estimate(pools, kind, blocks[:found], estimates.quantiles[number], to)


@kernel
def _held(panes: Ints, ids: Ints) -> Bools:
    """Which panes [P, M] of some entities are not too old to be read."""
    slots = panes.shape[1]
    held = np.empty((slots, len(ids)), dtype=np.bool_)
    for row in range(len(ids)):
        newest = panes[ids[row]].max()
        for slot in range(slots):
            held[slot, row] = panes[ids[row], slot] > max(newest - slots, _NO_PANE)
    return held


@kernel
def _empty(panes: Ints, oldest: int) -> Bools:
    """Which entities [K] have no pane from `oldest` on."""
    empty = np.ones(len(panes), dtype=np.bool_)
    for key in range(len(panes)):
        for slot in range(panes.shape[1]):
            if panes[key, slot] >= oldest:
                empty[key] = False
                break
    return empty
