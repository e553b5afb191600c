"""Session windows: runs of an entity's events with less than a gap of event time between neighbours.

A session covers [first, last + gap), as Spark's session_window; an event inside the cover of one extends it, and joins
two that it lies between. Several sessions of an entity can be open at a time, because events come out of order.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from streaming import partials
from streaming.cells import CellArrays, Cells, give_row, take_row
from streaming.compile_kernels import kernel
from streaming.keys import Places
from streaming.partials import CELL, COUNT_CELL, SKETCH, Estimates
from streaming.plan import Aggregate
from streaming.records import Bools, Floats, Ints
from streaming.windows import NEVER_US, outputs

_FIRST, _LAST, _TOLD, _ROW = range(4)


class Sessions:
    """The sessions of one gap, newest first: [K, R, 4] first and last event, whether told, the row of their cells or 0.

    R is how many sessions can be open within the watermark's delay and the lateness, and two more, which may be closed.

    Args:
        aggregates: Those of one gap, each with its column of the plan.
        lateness_us: For how long after the watermark a session still takes events.
        history_us: How far the moments of `merge` may lie behind the newest event.
        final: A moment of `merge` reads the session that ends there, once, instead of the one that is going on.
    """

    lasting = False

    def __init__(
        self, aggregates: Sequence[tuple[int, Aggregate]], lateness_us: int, history_us: int, final: bool
    ) -> None:
        self.gap_us = aggregates[0][1].window_us
        self._lateness_us, self._final = lateness_us, final
        self._size = sessions_open(self.gap_us, history_us)
        self._aggregates = aggregates
        self._cells = Cells(aggregates, 0)
        self._bounds = _bounds(0, self._size)
        self._outputs = outputs(self._cells.layout, aggregates, [1] * len(aggregates))
        self.readings = self._outputs.readings

    @property
    def held(self) -> int:
        """How many sessions there are."""
        return self._cells.held

    def nbytes(self, keys: int, events: int = 0) -> int:
        """Memory that is taken once there is room for so many entities and so many more events."""
        return 32 * self._size * keys + self._cells.nbytes(events)

    def reserve(self, keys: int, events: int) -> None:
        """Makes room for so many entities, and for what so many more events can need."""
        if keys > len(self._bounds):
            before, self._bounds = self._bounds, _bounds(keys, self._size)
            self._bounds[: len(before)] = before
        self._cells.reserve(events)

    def closed(self, times: Ints, marks: Ints) -> Bools:
        """Which events [N] come after the session that each would be alone is closed."""
        closed: Bools = times + self.gap_us + self._lateness_us <= marks
        return closed

    def add(
        self, ids: Ints, times: Ints, marks: Ints, values: Floats, present: Bools, anew: Bools, due_us: Ints
    ) -> None:
        """Adds N events in order, but for those of id -1 and those that come too late for the watermark [N].

        Before those that begin `anew` (empty for none) the sessions of their entity are given back. For final sessions
        `due_us` [K] becomes the end of the first session that was not read.
        """
        closed, final_due_us = self.closed(times, marks), due_us if self._final else due_us[:0]
        columns = (ids, times, closed, values, present, anew)
        _add(*columns, self.gap_us, self._bounds, final_due_us, self._cells.arrays)

    def merge(self, ids: Ints, moments_us: Ints, due_us: Ints) -> Floats:
        """The outputs [M, O] of the sessions that hold, or end, at a moment [M] each; lowers `due_us` of the entities.

        `due_us` [K] becomes at most the end of the next session that ends.
        """
        out = np.zeros((len(ids), self._outputs.width))
        wanted, final = self._outputs, self._final
        windows, estimates = wanted.windows, wanted.estimates
        _merge(ids, moments_us, windows, estimates, self.gap_us, final, self._bounds, due_us, out, self._cells.arrays)
        return out

    def empty(self, keys: int, mark_us: int) -> Bools:
        """Which of the first `keys` entities hold nothing that an event from this watermark on could join."""
        newest = self._bounds[:keys, 0, _LAST]
        empty: Bools = newest + 2 * self.gap_us + self._lateness_us <= mark_us
        return empty

    def keep(self, ids: Ints) -> None:
        """Forgets all entities but those of `ids`, which become 0, 1, ... in this order, and their memory."""
        arrays = self.state(ids)
        self._cells, self._bounds = Cells(self._aggregates, 0), _bounds(len(ids), self._size)
        self.restore(np.arange(len(ids)), arrays)

    def texts(self, column: int) -> list[Places]:
        """Where sessions name texts of a column."""
        rows = self._bounds[:, :, _ROW]
        return self._cells.texts(rows[rows > 0], column)

    def state(self, ids: Ints) -> list[npt.NDArray[Any]]:
        """What some entities hold, with their sketches, for `restore`."""
        bounds = self._bounds[ids]
        rows = bounds[:, :, _ROW]
        return [bounds[:, :, :_ROW], *self._cells.state(rows[rows > 0])]

    def restore(self, ids: Ints, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Takes the arrays of `state` for these entities, for which there is room; they are copied."""
        _drop_all(ids.copy(), self._bounds, self._cells.arrays)
        bounds = np.zeros((len(ids), self._size, 4), dtype=np.int64)
        bounds[:, :, :_ROW] = arrays[0]
        bounds[bounds[:, :, _FIRST] != -NEVER_US, _ROW] = self._cells.restore(arrays[1:])
        self._bounds[ids] = bounds


def _bounds(keys: int, size: int) -> Ints:
    """Entities without sessions [K, R, 4]."""
    bounds = np.zeros((keys, size, 4), dtype=np.int64)
    bounds[:, :, (_FIRST, _LAST, _TOLD)] = -NEVER_US
    return bounds


def sessions_open(gap_us: int, history_us: int) -> int:
    """How many sessions of an entity can be open at a time, and two that are closed."""
    return history_us // gap_us + 4


@kernel
def _add(
    ids: Ints,
    times: Ints,
    closed: Bools,
    values: Floats,
    present: Bools,
    anew: Bools,
    gap_us: int,
    bounds: Ints,
    due_us: Ints,
    cells: CellArrays,
) -> None:
    operations, rows = cells.operations, cells.rows
    sessions, width = bounds.shape[1], rows.shape[1]
    flat = rows.reshape(-1)
    for row in range(len(ids)):
        key, time = ids[row], times[row]
        if key < 0 or closed[row]:
            continue
        if len(anew) and anew[row]:
            _drop(key, bounds, cells)
        at = 0
        while at < sessions and time <= bounds[key, at, _FIRST] - gap_us:
            at += 1
        if at == sessions:
            continue  # more sessions than can be open: this one is older than them all and closed
        if bounds[key, at, _ROW] == 0 or time >= bounds[key, at, _LAST] + gap_us:
            oldest = bounds[key, sessions - 1, _ROW]
            if oldest > 0:
                give_row(oldest, 0, cells)
            for place in range(sessions - 1, at, -1):
                bounds[key, place] = bounds[key, place - 1]
            bounds[key, at, _FIRST] = bounds[key, at, _LAST] = time
            bounds[key, at, _ROW] = take_row(cells, 0)
        else:
            bounds[key, at, _FIRST] = min(bounds[key, at, _FIRST], time)
            bounds[key, at, _LAST] = max(bounds[key, at, _LAST], time)
            if at + 1 < sessions and bounds[key, at, _FIRST] < bounds[key, at + 1, _LAST] + gap_us:
                _join(key, at, bounds, cells)
        bounds[key, at, _TOLD] = 0
        base = bounds[key, at, _ROW] * width
        partials.update(flat, base, operations, time, values, present, row)
        if cells.has_sketches:
            partials.update_sketches(flat, base, operations, cells.pools, values, present, row)
        if len(due_us):
            due_us[key] = _next_end(key, gap_us, bounds)


@kernel
def _join(key: int, at: int, bounds: Ints, cells: CellArrays) -> None:
    """Merges a session with the one before it, whose place is taken by older ones."""
    operations, sessions, width = cells.operations, bounds.shape[1], cells.rows.shape[1]
    flat = cells.rows.reshape(-1)
    newer, older = bounds[key, at, _ROW], bounds[key, at + 1, _ROW]
    first = 0
    for end in range(1, len(operations) + 1):
        if end == len(operations) or operations[end, COUNT_CELL] != operations[first, COUNT_CELL]:
            partials.combine(flat, older * width, flat, newer * width, operations, first, end, 0)
            first = end
    if cells.has_sketches:
        partials.combine_sketches(flat, older * width, newer * width, operations, cells.pools)
    give_row(newer, 0, cells)
    bounds[key, at, _ROW] = older
    bounds[key, at, _FIRST] = min(bounds[key, at, _FIRST], bounds[key, at + 1, _FIRST])
    for place in range(at + 1, sessions - 1):
        bounds[key, place] = bounds[key, place + 1]
    bounds[key, sessions - 1, :_ROW] = -NEVER_US
    bounds[key, sessions - 1, _ROW] = 0


@kernel
def _drop_all(ids: Ints, bounds: Ints, cells: CellArrays) -> None:
    for key in ids:
        _drop(key, bounds, cells)


@kernel
def _drop(key: int, bounds: Ints, cells: CellArrays) -> None:
    """Gives back all sessions of an entity."""
    for at in range(bounds.shape[1]):
        if bounds[key, at, _ROW] > 0:
            give_row(bounds[key, at, _ROW], 0, cells)
        bounds[key, at, :_ROW] = -NEVER_US
        bounds[key, at, _ROW] = 0


@kernel
def _next_end(key: int, gap_us: int, bounds: Ints) -> int:
    end = NEVER_US
    for at in range(bounds.shape[1]):
        if bounds[key, at, _FIRST] != -NEVER_US and bounds[key, at, _TOLD] == 0:
            end = min(end, bounds[key, at, _LAST] + gap_us)
    return end


@kernel
def _merge(
    ids: Ints,
    moments: Ints,
    windows: Ints,
    estimates: Estimates,
    gap_us: int,
    final: bool,
    bounds: Ints,
    due_us: Ints,
    out: Floats,
    cells: CellArrays,
) -> None:
    operations, rows = cells.operations, cells.rows
    flat, flat_out = rows.reshape(-1), out.reshape(-1)
    sessions, width = bounds.shape[1], rows.shape[1]
    ends = np.append(estimates.outs[1:], out.shape[1])
    block = np.zeros(1, dtype=np.int64)
    for row in range(len(ids)):
        key = ids[row]
        at = 0
        if final:
            while at < sessions and (bounds[key, at, _LAST] + gap_us > moments[row] or bounds[key, at, _TOLD] == 1):
                at += 1
            found = at < sessions and bounds[key, at, _LAST] + gap_us == moments[row]
        else:
            found = bounds[key, 0, _FIRST] != -NEVER_US and moments[row] < bounds[key, 0, _LAST] + gap_us
        base = bounds[key, at, _ROW] * width if found else 0
        if found:
            for window in range(len(windows)):
                first, end = windows[window, 0], windows[window, 1]
                to = row * out.shape[1] + windows[window, 3]
                partials.combine(flat_out, to, flat, base, operations, first, end, operations[first, COUNT_CELL])
        for number in range(len(estimates.outs)):
            operation = estimates.operations[number]
            block[0] = int(flat[base + operations[operation, CELL]]) if found else 0
            to_estimate = out[row, estimates.outs[number] : ends[number]]
            kind = operations[operation, SKETCH]
            partials.estimate(cells.pools, kind, block[block > 0], estimates.quantiles[number], to_estimate)
        if final:
            if found:
                bounds[key, at, _TOLD] = 1
            due_us[key] = min(due_us[key], _next_end(key, gap_us, bounds))
        elif found:
            due_us[key] = min(due_us[key], bounds[key, 0, _LAST] + gap_us)
