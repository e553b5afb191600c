"""Session windows: runs of an entity's events with less than a gap of event time between neighbours.

A session covers [first, last + gap), as Spark's session_window; an event inside the cover of one extends it, and joins
two that it lies between. Several sessions of an entity can be open at a time, because events come out of order.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from streaming import partials
from streaming.cells import Cells, grown
from streaming.compile_kernels import kernel
from streaming.partials import CELL, COUNT_CELL, SKETCH, Estimates
from streaming.plan import Aggregate
from streaming.records import Bools, Floats, Ints
from streaming.sketches import Pools
from streaming.windows import NEVER_US, outputs

_FIRST, _LAST, _TOLD = range(3)


class Sessions:
    """The sessions of one gap: bounds [K, R, 3] (first, last, whether told) and cells [R, K, S], newest first.

    R is how many sessions can be open within the watermark's delay and the lateness, and two more, which may be closed.

    Args:
        aggregates: Those of one gap, each with its column of the plan.
        lateness_us: For how long after the watermark a session still takes events.
        history_us: How far the moments of `merge` may lie behind the newest event.
        final: A moment of `merge` reads the session that ends there, once, instead of the one that is going on.
    """

    def __init__(
        self, aggregates: Sequence[tuple[int, Aggregate]], lateness_us: int, history_us: int, final: bool
    ) -> None:
        self.gap_us = aggregates[0][1].window_us
        self._lateness_us, self._final = lateness_us, final
        self._size = sessions_open(self.gap_us, history_us)
        self._cells = Cells(aggregates, self._size)
        self._bounds = np.zeros((0, self._size, 3), dtype=np.int64)
        self._outputs = outputs(self._cells.layout, aggregates, [1] * len(aggregates))
        self.readings = self._outputs.readings

    def reserve(self, keys: int) -> None:
        """Makes room for `keys` entities; arrays grow by doubling."""
        if keys > len(self._bounds):
            keys = max(keys, 2 * len(self._bounds))
            self._bounds = grown(self._bounds, keys, -NEVER_US)
            self._cells.reserve(keys)

    def bytes_per_key(self) -> int:
        """Memory that one entity takes, sketches not counted."""
        return 24 * self._size + self._cells.bytes_per_key

    def pool_bytes(self) -> int:
        """Memory of the sketches."""
        return self._cells.pool_bytes

    def closed(self, times: Ints, marks: Ints) -> Bools:
        """Which events [N] come after the session that each would be alone is closed."""
        closed: Bools = times + self.gap_us + self._lateness_us <= marks
        return closed

    def add(self, ids: Ints, times: Ints, marks: Ints, values: Floats, present: Bools, due_us: Ints) -> None:
        """Adds N events in order, but for those of id -1 and those that come too late for the watermark [N].

        For final sessions `due_us` [K] becomes the end of the first session that was not read.
        """
        cells, layout = self._cells, self._cells.layout
        cells.reserve_sketches(len(ids))
        _add(
            ids,
            times,
            self.closed(times, marks),
            values,
            present,
            self.gap_us,
            layout.operations,
            cells.has_sketches,
            cells.pools,
            self._bounds,
            cells.array,
            due_us if self._final else due_us[:0],
        )

    def merge(self, ids: Ints, moments_us: Ints, due_us: Ints) -> Floats:
        """The outputs [M, O] of the sessions that hold, or end, at a moment [M] each; lowers `due_us` of the entities.

        `due_us` [K] becomes at most the end of the next session that ends.
        """
        out = np.zeros((len(ids), self._outputs.width))
        cells, wanted = self._cells, self._outputs
        _merge(
            ids,
            moments_us,
            wanted.windows,
            self.gap_us,
            self._final,
            cells.layout.operations,
            wanted.estimates,
            cells.pools,
            self._bounds,
            cells.array,
            due_us,
            out,
        )
        return out

    def empty(self, keys: int, mark_us: int) -> Bools:
        """Which of the first `keys` entities hold nothing that is still needed from this watermark on."""
        newest = self._bounds[:keys, 0, _LAST]
        empty: Bools = newest + self.gap_us + self._lateness_us <= mark_us
        return empty

    def keep(self, ids: Ints) -> None:
        """Forgets all entities but those of `ids`, which become 0, 1, ... in this order."""
        self._bounds = self._bounds[ids]
        self._cells.keep(ids)

    def state(self, ids: Ints) -> list[npt.NDArray[Any]]:
        """What some entities hold, with their sketches, for `restore`."""
        bounds = self._bounds[ids]
        return [bounds, *self._cells.state(ids, bounds[:, :, _FIRST].T != -NEVER_US)]

    def restore(self, ids: Ints, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Takes the arrays of `state` for these entities, for which there is room; they are copied."""
        self._bounds[ids] = arrays[0]
        self._cells.restore(ids, arrays[0][:, :, _FIRST].T != -NEVER_US, arrays[1:])


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
    gap_us: int,
    operations: Ints,
    has_sketches: bool,
    pools: Pools,
    bounds: Ints,
    cells: Floats,
    due_us: Ints,
) -> None:
    sessions, keys, size = cells.shape
    flat = cells.reshape(-1)
    for row in range(len(ids)):
        key, time = ids[row], times[row]
        if key < 0 or closed[row]:
            continue
        at = 0
        while at < sessions and time <= bounds[key, at, _FIRST] - gap_us:
            at += 1
        if at == sessions:
            continue  # more sessions than can be open: this one is older than them all and closed
        base = (at * keys + key) * size
        if bounds[key, at, _FIRST] == -NEVER_US or time >= bounds[key, at, _LAST] + gap_us:
            _insert(key, at, operations, has_sketches, pools, bounds, cells)
            bounds[key, at, _FIRST] = bounds[key, at, _LAST] = time
        else:
            bounds[key, at, _FIRST] = min(bounds[key, at, _FIRST], time)
            bounds[key, at, _LAST] = max(bounds[key, at, _LAST], time)
            if at + 1 < sessions and bounds[key, at, _FIRST] < bounds[key, at + 1, _LAST] + gap_us:
                _join(key, at, operations, has_sketches, pools, bounds, cells)
        bounds[key, at, _TOLD] = 0
        partials.update(flat, base, operations, time, values, present, row)
        if has_sketches:
            partials.update_sketches(flat, base, operations, pools, values, present, row)
        if len(due_us):
            due_us[key] = _next_end(key, gap_us, bounds)


@kernel
def _insert(
    key: int,
    at: int,
    operations: Ints,
    has_sketches: bool,
    pools: Pools,
    bounds: Ints,
    cells: Floats,
) -> None:
    """Makes an empty session at a place; the oldest one is forgotten."""
    sessions, keys, size = cells.shape
    last = ((sessions - 1) * keys + key) * size
    partials.clear(cells.reshape(-1), last, size, operations, pools, has_sketches)
    for place in range(sessions - 1, at, -1):
        bounds[key, place] = bounds[key, place - 1]
        cells[place, key] = cells[place - 1, key]
    cells[at, key] = 0.0


@kernel
def _join(
    key: int,
    at: int,
    operations: Ints,
    has_sketches: bool,
    pools: Pools,
    bounds: Ints,
    cells: Floats,
) -> None:
    """Merges a session with the one before it, whose place is taken by older ones."""
    sessions, keys, size = cells.shape
    flat = cells.reshape(-1)
    newer, older = (at * keys + key) * size, ((at + 1) * keys + key) * size
    first = 0
    for end in range(1, len(operations) + 1):
        if end == len(operations) or operations[end, COUNT_CELL] != operations[first, COUNT_CELL]:
            partials.combine(flat, older, flat, newer, operations, first, end, 0)
            first = end
    if has_sketches:
        partials.combine_sketches(flat, older, newer, operations, pools)
    cells[at, key] = cells[at + 1, key]
    bounds[key, at, _FIRST] = min(bounds[key, at, _FIRST], bounds[key, at + 1, _FIRST])
    for place in range(at + 1, sessions - 1):
        bounds[key, place] = bounds[key, place + 1]
        cells[place, key] = cells[place + 1, key]
    bounds[key, sessions - 1] = -NEVER_US
    cells[sessions - 1, key] = 0.0


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
    gap_us: int,
    final: bool,
    operations: Ints,
    estimates: Estimates,
    pools: Pools,
    bounds: Ints,
    cells: Floats,
    due_us: Ints,
    out: Floats,
) -> None:
    flat, flat_out = cells.reshape(-1), out.reshape(-1)
    sessions, keys, size = cells.shape
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
        base = (at * keys + key) * size
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
            partials.estimate(pools, kind, block[block > 0], estimates.quantiles[number], to_estimate)
        if final:
            if found:
                bounds[key, at, _TOLD] = 1
            due_us[key] = min(due_us[key], _next_end(key, gap_us, bounds))
        elif found:
            due_us[key] = min(due_us[key], bounds[key, 0, _LAST] + gap_us)
