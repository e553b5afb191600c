"""Windows by count: the last N events of an entity, by event time and where that is equal by offset.

They are kept as they are and their aggregates are computed anew when they are read.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from streaming import partials
from streaming.cells import grown
from streaming.compile_kernels import kernel
from streaming.keys import Places
from streaming.partials import CELL, COUNT_CELL, SKETCH, Estimates
from streaming.plan import Aggregate
from streaming.records import Bools, Floats, Ints
from streaming.sketches import Pools, empty_pools, reserve
from streaming.windows import outputs


class LastEvents:
    """The last N events of each entity: times [K, N] in order, values and whether they are present [K, N, C].

    Args:
        aggregates: Those of one N, each with its column of the plan.
    """

    lasting = True

    def __init__(self, aggregates: Sequence[tuple[int, Aggregate]]) -> None:
        self._size = aggregates[0][1].size
        self._layout = partials.layout(aggregates)
        self._outputs = outputs(self._layout, aggregates, [1] * len(aggregates))
        self.readings = self._outputs.readings
        self._width = 1 + max(self._layout.ranges)
        self._pools = reserve(empty_pools(self._layout.top_k), self._layout.blocks)
        self._counts = np.zeros(0, dtype=np.int64)
        self._times = np.zeros((0, self._size), dtype=np.int64)
        self._values = np.zeros((0, self._size, self._width))
        self._present = np.zeros((0, self._size, self._width), dtype=np.bool_)

    @property
    def held(self) -> int:
        """How many events there are."""
        return int(self._counts.sum())

    def nbytes(self, keys: int, events: int = 0) -> int:
        """Memory that is taken once there is room for so many entities; events need none of their own."""
        return keys * (8 + self._size * (8 + 9 * self._width)) + sum(array.nbytes for array in self._pools)

    def reserve(self, keys: int, events: int) -> None:
        """Makes room for so many entities."""
        if keys > len(self._counts):
            self._counts, self._times = grown(self._counts, keys, 0), grown(self._times, keys, 0)
            self._values, self._present = grown(self._values, keys, 0), grown(self._present, keys, 0)

    def closed(self, times: Ints, marks: Ints) -> Bools:
        """No event [N] is too late to be among the last."""
        return np.zeros(len(times), dtype=np.bool_)

    def add(
        self, ids: Ints, times: Ints, marks: Ints, values: Floats, present: Bools, anew: Bools, due_us: Ints
    ) -> None:
        """Adds N events in order, but for those of id -1 and those older than N others.

        Those that begin `anew` (empty for none) are the first of their entity.
        """
        _add(ids, times, values, present, anew, self._counts, self._times, self._values, self._present)

    def merge(self, ids: Ints, moments_us: Ints, due_us: Ints) -> Floats:
        """The outputs [M, O] of the last events; they change by events only, so `due_us` stays."""
        out = np.zeros((len(ids), self._outputs.width))
        state = (self._counts, self._times, self._values, self._present)
        layout, wanted = self._layout, self._outputs
        arguments = (wanted.windows, layout.size, layout.operations, any(layout.blocks), wanted.estimates, self._pools)
        _merge(ids, *arguments, *state, out)
        return out

    def empty(self, keys: int, mark_us: int) -> Bools:
        """Which of the first `keys` entities have no event."""
        empty: Bools = self._counts[:keys] == 0
        return empty

    def keep(self, ids: Ints) -> None:
        """Forgets all entities but those of `ids`, which become 0, 1, ... in this order."""
        self._counts, self._times = self._counts[ids], self._times[ids]
        self._values, self._present = self._values[ids], self._present[ids]

    def texts(self, column: int) -> list[Places]:
        """Where events name texts of a column."""
        if column not in self._layout.ranges:
            return []
        held = self._present[:, :, column] & (np.arange(self._size) < self._counts[:, None])
        key, place = np.nonzero(held)
        return [Places(self._values, (key, place, np.full(len(key), column)))]

    def state(self, ids: Ints) -> list[npt.NDArray[Any]]:
        """The arrays of some entities, for `restore`."""
        return [self._counts[ids], self._times[ids], self._values[ids], self._present[ids]]

    def restore(self, ids: Ints, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Takes the arrays of `state` for these entities, for which there is room; they are copied."""
        self._counts[ids], self._times[ids], self._values[ids], self._present[ids] = arrays


@kernel
def _add(
    ids: Ints,
    times: Ints,
    values: Floats,
    present: Bools,
    anew: Bools,
    counts: Ints,
    held_times: Ints,
    held_values: Floats,
    held_present: Bools,
) -> None:
    size, width = held_times.shape[1], held_values.shape[2]
    for row in range(len(ids)):
        key = ids[row]
        if key < 0:
            continue
        if len(anew) and anew[row]:
            counts[key] = 0
        at = counts[key]
        while at > 0 and held_times[key, at - 1] > times[row]:
            at -= 1
        if counts[key] < size:
            for place in range(counts[key], at, -1):
                held_times[key, place] = held_times[key, place - 1]
                held_values[key, place] = held_values[key, place - 1]
                held_present[key, place] = held_present[key, place - 1]
            counts[key] += 1
        else:
            at -= 1
            if at < 0:
                continue
            for place in range(at):
                held_times[key, place] = held_times[key, place + 1]
                held_values[key, place] = held_values[key, place + 1]
                held_present[key, place] = held_present[key, place + 1]
        held_times[key, at] = times[row]
        held_values[key, at] = values[row, :width]
        held_present[key, at] = present[row, :width]


@kernel
def _merge(
    ids: Ints,
    windows: Ints,
    size: int,
    operations: Ints,
    has_sketches: bool,
    estimates: Estimates,
    pools: Pools,
    counts: Ints,
    times: Ints,
    values: Floats,
    present: Bools,
    out: Floats,
) -> None:
    cells = np.zeros(size)
    flat = out.reshape(-1)
    ends = np.append(estimates.outs[1:], out.shape[1])
    block = np.zeros(1, dtype=np.int64)
    for row in range(len(ids)):
        key = ids[row]
        for at in range(counts[key]):
            partials.update(cells, 0, operations, times[key, at], values[key], present[key], at)
            if has_sketches:
                partials.update_sketches(cells, 0, operations, pools, values[key], present[key], at)
        for window in range(len(windows)):
            first, end = windows[window, 0], windows[window, 1]
            to = row * out.shape[1] + windows[window, 3]
            partials.combine(flat, to, cells, 0, operations, first, end, operations[first, COUNT_CELL])
        for number in range(len(estimates.outs)):
            operation = estimates.operations[number]
            block[0] = int(cells[operations[operation, CELL]])
            to_estimate = out[row, estimates.outs[number] : ends[number]]
            kind = operations[operation, SKETCH]
            partials.estimate(pools, kind, block[block > 0], estimates.quantiles[number], to_estimate)
        partials.clear(cells, 0, size, operations, pools, has_sketches)
