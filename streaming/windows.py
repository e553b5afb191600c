"""Time windows in panes: one partial aggregate per entity, column and slide, windows as merges of panes.

All windows of one slide share panes as wide as the slide. A pane is filled in offset order and panes are merged from
the oldest on, each window for itself and never by subtraction, so that results do not depend on how the records were
batched. A lifetime is a window of one pane that never ends.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from streaming import partials
from streaming.cells import CellArrays, Cells, give_row, prefetch_row, take_row
from streaming.compile_kernels import kernel
from streaming.keys import Places
from streaming.memory import address, lines, prefetch
from streaming.partials import CELL, COUNT_CELL, SKETCH, Estimates
from streaming.plan import Aggregate
from streaming.records import Bools, Floats, Ints

NEVER_US = 1 << 62

_NO_PANE = -(1 << 62)
_AHEAD = 8
_TOGETHER = 16

# An entity: its newest pane, the row of that one, how many panes it has.
_NEWEST, _ROW, _COUNT, _WIDTH = 0, 1, 2, 4
# What stands before the cells of a pane: its number and the row of the next older one, or 0.
_PANE, _OLDER, _HEADS = 0, 1, 2


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


class Panes:
    """The panes of one slide: those of an entity are rows of a pool, each with the row of the next older one.

    Pane p covers [p * slide, (p + 1) * slide) of event time. Windows read the last P of an entity, counted from its
    newest one; older ones are not kept for long, and not in a state.

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
        self.lasting = not self.slide_us
        self._lateness_us = lateness_us
        self._shift = int(final)
        lengths = [aggregate.window_us // self.slide_us if self.slide_us else 1 for _, aggregate in aggregates]
        self._size = max(lengths) + (-(-history_us // self.slide_us) + self._shift if self.slide_us else 0)
        self._aggregates = aggregates
        self._cells = Cells(aggregates, _HEADS)
        self._entities = _entities(0)
        self._outputs = outputs(self._cells.layout, aggregates, lengths)
        self.readings = self._outputs.readings

    @property
    def held(self) -> int:
        """How many panes there are."""
        return self._cells.held

    def nbytes(self, keys: int, events: int = 0) -> int:
        """Memory that is taken once there is room for so many entities and so many more events."""
        return 8 * _WIDTH * keys + self._cells.nbytes(events)

    def reserve(self, keys: int, events: int) -> None:
        """Makes room for so many entities, and for what so many more events can need."""
        if keys > len(self._entities):
            before, self._entities = self._entities, _entities(keys)
            self._entities[: len(before)] = before
        self._cells.reserve(events)

    def closed(self, times: Ints, marks: Ints) -> Bools:
        """Which events [N] come after the pane that they belong to is closed."""
        if not self.slide_us:
            return np.zeros(len(times), dtype=np.bool_)
        closed: Bools = (times // self.slide_us + 1) * self.slide_us + self._lateness_us <= marks
        return closed

    def add(
        self, ids: Ints, times: Ints, marks: Ints, values: Floats, present: Bools, anew: Bools, due_us: Ints
    ) -> None:
        """Adds N events in order, but for those of id -1 and those whose pane the watermark [N] has closed.

        Before those that begin `anew` (empty for none) the panes of their entity are given back. For final windows
        `due_us` [K] becomes at most the end of each event's pane.
        """
        closed_us, final_due_us = marks - self._lateness_us, due_us[: self._shift * len(due_us)]
        columns = (ids, times, closed_us, values, present, anew)
        _add(*columns, self.slide_us, self._size, self._entities, final_due_us, self._cells.arrays)

    def merge(self, ids: Ints, moments_us: Ints, due_us: Ints) -> Floats:
        """The outputs [M, O] of the windows that hold at a moment [M] each; lowers `due_us` of these entities.

        `due_us` [K] becomes at most the next moment at which one of the windows gains or loses a pane.
        """
        out = np.zeros((len(ids), self._outputs.width))
        currents = moments_us // self.slide_us - self._shift if self.slide_us else np.zeros_like(moments_us)
        windows, estimates, cells = self._outputs.windows, self._outputs.estimates, self._cells
        size, entities = self._size, self._entities
        _merge(ids, currents, windows, size, entities, self.slide_us, self._shift, due_us, out, cells.arrays)
        if len(estimates.outs):
            _estimate(ids, currents, windows, size, entities, estimates, out, cells.arrays)
        return out

    def empty(self, keys: int, mark_us: int) -> Bools:
        """Which of the first `keys` entities hold nothing that a window from this watermark on could read."""
        oldest = mark_us // self.slide_us - self._size if self.slide_us else 0
        empty: Bools = self._entities[:keys, _NEWEST] < oldest
        return empty

    def keep(self, ids: Ints) -> None:
        """Forgets all entities but those of `ids`, which become 0, 1, ... in this order, and their memory."""
        arrays = self.state(ids)
        self._cells, self._entities = Cells(self._aggregates, _HEADS), _entities(len(ids))
        self.restore(np.arange(len(ids)), arrays)

    def texts(self, column: int) -> list[Places]:
        """Where panes that can be read name texts of a column."""
        _, rows = _held(np.arange(len(self._entities)), self._entities, self._size, self._cells.rows)
        return self._cells.texts(rows, column)

    def state(self, ids: Ints) -> list[npt.NDArray[Any]]:
        """How many panes some entities hold, which, newest first, and what is in them, for `restore`."""
        cells = self._cells
        counts, rows = _held(ids, self._entities, self._size, cells.rows)
        return [counts.astype(np.int32), cells.rows[rows, _PANE].astype(np.int64), *cells.state(rows)]

    def restore(self, ids: Ints, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Takes the arrays of `state` for these entities, for which there is room; they are copied."""
        counts, panes = arrays[:2]
        cells = self._cells
        _drop_all(ids.copy(), self._entities, cells.arrays)
        rows = cells.restore(arrays[2:])
        cells.rows[rows, _PANE] = panes
        cells.rows[rows[:-1], _OLDER] = rows[1:]
        ends = np.cumsum(counts)
        holding = counts > 0
        cells.rows[rows[ends[holding] - 1], _OLDER] = 0
        newest = (ends - counts)[holding]
        entities = ids[holding]
        self._entities[entities, _NEWEST] = panes[newest]
        self._entities[entities, _ROW] = rows[newest]
        self._entities[entities, _COUNT] = counts[holding]


def _entities(keys: int) -> Ints:
    """Entities without panes [K, 4]."""
    entities = lines(keys, _WIDTH)
    entities[:, _NEWEST] = _NO_PANE
    return entities


@kernel
def _add(
    ids: Ints,
    times: Ints,
    closed_us: Ints,
    values: Floats,
    present: Bools,
    anew: Bools,
    slide_us: int,
    most: int,
    entities: Ints,
    due_us: Ints,
    cells: CellArrays,
) -> None:
    operations, rows = cells.operations, cells.rows
    flat, width = rows.reshape(-1), rows.shape[1]
    start, end, pane = 0, 0, _NO_PANE
    if slide_us == 0:
        start, end, pane = -NEVER_US, NEVER_US, 0
    entities_base = address(entities)
    for row in range(len(ids)):
        # Two steps that each wait for memory are begun for later rows: the entity, then the pane that it names.
        if row + 2 * _AHEAD < len(ids):
            prefetch(entities_base + 8 * _WIDTH * ids[row + 2 * _AHEAD])
        if row + _AHEAD < len(ids):
            ahead = ids[row + _AHEAD]
            if ahead >= 0 and entities[ahead, _NEWEST] == pane:  # most events lie in the pane of those before them
                prefetch_row(rows, entities[ahead, _ROW])
        key, time = ids[row], times[row]
        if key < 0:
            continue
        if not start <= time < end:
            pane = time // slide_us
            start = pane * slide_us
            end = start + slide_us
        if len(anew) and anew[row]:
            _drop(key, NEVER_US, entities, cells)
        newest = entities[key, _NEWEST]
        if end <= closed_us[row] or pane <= newest - most:
            continue
        if pane == newest:
            at = entities[key, _ROW]
        elif pane > newest:
            if entities[key, _COUNT] >= 2 * most:
                _drop(key, pane - most, entities, cells)
            at = take_row(cells, _HEADS)
            flat[at * width + _PANE], flat[at * width + _OLDER] = pane, entities[key, _ROW]
            entities[key, _NEWEST], entities[key, _ROW] = pane, at
            entities[key, _COUNT] += 1
        else:
            at = _among_older(key, pane, entities, cells)
        base = at * width + _HEADS
        partials.update(flat, base, operations, time, values, present, row)
        if cells.has_sketches:
            partials.update_sketches(flat, base, operations, cells.pools, values, present, row)
        if len(due_us) and partials.any_present(operations, present, row):
            due_us[key] = min(due_us[key], end)


@kernel
def _among_older(key: int, pane: int, entities: Ints, cells: CellArrays) -> int:
    """The row of a pane older than the newest one; a new row where it has none."""
    rows = cells.rows
    newer, at = 0, entities[key, _ROW]
    while at > 0 and rows[at, _PANE] > pane:
        newer, at = at, int(rows[at, _OLDER])
    if at == 0 or rows[at, _PANE] < pane:
        older, at = at, take_row(cells, _HEADS)
        rows[at, _PANE], rows[at, _OLDER] = pane, older
        rows[newer, _OLDER] = at
        entities[key, _COUNT] += 1
    return int(at)


@kernel
def _drop(key: int, last: int, entities: Ints, cells: CellArrays) -> None:
    """Gives back the panes of an entity up to one."""
    rows = cells.rows
    newer, at = 0, entities[key, _ROW]
    while at > 0 and rows[at, _PANE] > last:
        newer, at = at, int(rows[at, _OLDER])
    if newer > 0:
        rows[newer, _OLDER] = 0
    else:
        entities[key, _NEWEST], entities[key, _ROW] = _NO_PANE, 0
    entities[key, _COUNT] -= _give(at, cells)


@kernel
def _give(at: int, cells: CellArrays) -> int:
    """Gives back a pane and those older; how many they were."""
    count = 0
    while at > 0:
        older = int(cells.rows[at, _OLDER])
        give_row(at, _HEADS, cells)
        at = older
        count += 1
    return int(count)


@kernel
def _drop_all(ids: Ints, entities: Ints, cells: CellArrays) -> None:
    for key in ids:
        _drop(key, NEVER_US, entities, cells)


@kernel
def _merge(
    ids: Ints,
    currents: Ints,
    windows: Ints,
    most: int,
    entities: Ints,
    slide_us: int,
    shift: int,
    due_us: Ints,
    out: Floats,
    cells: CellArrays,
) -> None:
    operations = cells.operations
    flat, flat_out = cells.rows.reshape(-1), out.reshape(-1)
    longest = windows[:, 2].max()
    entities_base = address(entities)
    panes = np.empty((_TOGETHER, most), dtype=np.int64)
    bases = np.empty((_TOGETHER, most), dtype=np.int64)
    found, newer, next_row = np.zeros((3, _TOGETHER), dtype=np.int64)
    for first in range(0, len(ids), _TOGETHER):
        last = min(first + _TOGETHER, len(ids))
        for soon in range(last, min(last + _TOGETHER, len(ids))):
            prefetch(entities_base + 8 * _WIDTH * ids[soon])
        _gather(
            ids[first:last], currents[first:last] - longest, most, entities, panes, bases, found, newer, next_row, cells
        )
        for row in range(first, last):
            one, current = row - first, currents[row]
            change = NEVER_US
            for window in range(len(windows)):
                first_operation, end_operation, length = windows[window, 0], windows[window, 1], windows[window, 2]
                count_at = operations[first_operation, COUNT_CELL]
                to = row * out.shape[1] + windows[window, 3]
                any_found = False
                for number in range(found[one] - 1, -1, -1):
                    base, pane = bases[one, number], panes[one, number]
                    if pane <= current - length or flat[base + count_at] == 0.0:
                        continue
                    if pane > current:
                        change = min(change, pane)
                        continue
                    partials.combine(flat_out, to, flat, base, operations, first_operation, end_operation, count_at)
                    if not any_found:
                        any_found = True
                        change = min(change, pane + length)
            if change < NEVER_US and slide_us > 0:
                due_us[ids[row]] = min(due_us[ids[row]], (change + shift) * slide_us)


@kernel
def _gather(
    ids: Ints,
    after: Ints,
    most: int,
    entities: Ints,
    panes: Ints,
    bases: Ints,
    found: Ints,
    newer: Ints,
    next_row: Ints,
    cells: CellArrays,
) -> None:
    """Finds the panes of a few entities after one each, newest first: their numbers and cells; gives back too old ones.

    It goes a step for each entity in turn, so that many wait for memory at a time.
    """
    rows = cells.rows
    flat, width = rows.reshape(-1), rows.shape[1]
    for one in range(len(ids)):
        found[one], next_row[one] = 0, entities[ids[one], _ROW]
        prefetch_row(rows, next_row[one])
    walking = True
    while walking:
        walking = False
        for one in range(len(ids)):
            at = next_row[one]
            if at == 0:
                continue
            key, pane = ids[one], int(flat[at * width + _PANE])
            if pane <= entities[key, _NEWEST] - most:
                rows[newer[one], _OLDER] = 0
                entities[key, _COUNT] -= _give(at, cells)
                next_row[one] = 0
                continue
            if pane > after[one]:
                panes[one, found[one]], bases[one, found[one]] = pane, at * width + _HEADS
                found[one] += 1
            newer[one], at = at, int(flat[at * width + _OLDER])
            next_row[one] = at
            walking |= at > 0
            prefetch_row(rows, at)


@kernel
def _estimate(
    ids: Ints,
    currents: Ints,
    windows: Ints,
    most: int,
    entities: Ints,
    estimates: Estimates,
    out: Floats,
    cells: CellArrays,
) -> None:
    operations, rows = cells.operations, cells.rows
    blocks = np.empty(most, dtype=np.int64)
    ends = np.append(estimates.outs[1:], out.shape[1])
    for row in range(len(ids)):
        for number in range(len(estimates.outs)):
            operation, length = estimates.operations[number], windows[estimates.windows[number], 2]
            first = most
            at = entities[ids[row], _ROW]
            while at > 0 and rows[at, _PANE] > currents[row] - length:
                block = int(rows[at, _HEADS + operations[operation, CELL]])
                if rows[at, _PANE] <= currents[row] and block > 0:
                    first -= 1
                    blocks[first] = block
                at = int(rows[at, _OLDER])
            kind = operations[operation, SKETCH]
            to = out[row, estimates.outs[number] : ends[number]]
            partials.estimate(cells.pools, kind, blocks[first:], estimates.quantiles[number], to)


@kernel
def _held(ids: Ints, entities: Ints, most: int, rows: Floats) -> tuple[Ints, Ints]:
    """How many panes of some entities [M] are not too old to be read, and their rows, newest first."""
    counts = np.zeros(len(ids), dtype=np.int64)
    held = np.empty(entities[:, _COUNT][ids].sum(), dtype=np.int64)
    count = 0
    for number in range(len(ids)):
        key = ids[number]
        at = entities[key, _ROW]
        while at > 0 and rows[at, _PANE] > entities[key, _NEWEST] - most:
            held[count] = at
            counts[number] += 1
            count += 1
            at = int(rows[at, _OLDER])
    return counts, held[:count]
