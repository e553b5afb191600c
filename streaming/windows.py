"""Windowed aggregates in panes: one partial aggregate per entity, column and slide, windows as merges of panes.

All windows of one slide share a ring of panes as wide as the slide. A pane holds what any mergeable aggregate of the
ring needs (now the count and the sum of each column); it is filled in offset order and panes are merged from the oldest
on, each window for itself and never by subtraction, so that results do not depend on how the records were batched.
"""

from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from streaming.compile_kernels import kernel
from streaming.plan import Plan
from streaming.records import Bools, Floats, Ints

NEVER_US = 1 << 62

T = TypeVar("T", bound=np.generic)

_NO_PANE = -(1 << 62)
_COUNT, _SUM = 0, 1


class Window(NamedTuple):
    """One column over the last `panes` panes."""

    column: int
    panes: int


class PaneRing:
    """The panes of one slide: an array [K, P, C, 2] over entities, a ring of panes, columns, and count and sum.

    Pane p covers [p * slide, (p + 1) * slide) of event time and lies at p modulo P; `newest` holds an entity's highest
    p so far, and whatever lies more than P - 1 below it is gone. P is the longest window: a pane that no fresh window
    can reach any more is not kept. Counts are held as floats, exact to 2**53, so that a pane is one piece of memory.
    """

    def __init__(self, slide_us: int, windows: tuple[Window, ...]) -> None:
        self.slide_us = slide_us
        self.windows = windows
        columns = sorted({window.column for window in windows})
        panes = max(window.panes for window in windows)
        self._columns = np.array(columns, dtype=np.int64)
        self._windows = np.array([(columns.index(column), panes) for column, panes in windows], dtype=np.int64)
        self._newest = np.zeros(0, dtype=np.int64)
        self._cells = np.zeros((0, panes, len(columns), 2), dtype=np.float64)

    def reserve(self, keys: int) -> None:
        """Makes room for `keys` entities; arrays grow by doubling."""
        if keys > len(self._newest):
            keys = max(keys, 2 * len(self._newest))
            self._newest = _grown(self._newest, keys, _NO_PANE)
            self._cells = _grown(self._cells, keys, 0)

    def add(self, ids: Ints, times: Ints, watermarks: Ints, values: Floats, present: Bools) -> None:
        """Adds N events in order, but for those of id -1 and those whose pane the watermark [N] has closed."""
        _add(ids, times, watermarks, values, present, self._columns, self.slide_us, self._newest, self._cells)

    def merge(self, ids: Ints, clock_us: int, due_us: Ints) -> tuple[Ints, Floats]:
        """Counts and sums [M, W] of the windows that are fresh at the clock; lowers `due_us` of these entities.

        `due_us` [K] becomes at most the time at which the first pane that counts leaves one of the windows.
        """
        counts = np.zeros((len(ids), len(self._windows)), dtype=np.int64)
        sums = np.zeros((len(ids), len(self._windows)), dtype=np.float64)
        current = clock_us // self.slide_us
        _merge(ids, current, self.slide_us, self._windows, self._newest, self._cells, due_us, counts, sums)
        return counts, sums

    def state(self, keys: int) -> tuple[Ints, Floats]:
        """The arrays of the first `keys` entities, for `restore`."""
        return self._newest[:keys], self._cells[:keys]

    def restore(self, newest: Ints, cells: Floats) -> None:
        """Takes the arrays of `state`; they are copied."""
        self._newest, self._cells = newest.copy(), cells.copy()


class Slot(NamedTuple):
    """Where an aggregate finds its count and sum: a ring and one of its windows."""

    ring: int
    window: int


def rings(plan: Plan) -> tuple[list[PaneRing], list[Slot]]:
    """One ring for each slide of a plan, shortest first, and where each aggregate lies; equal windows are shared."""
    names = [column.name for column in plan.columns]
    windows: dict[int, list[Window]] = {slide_us: [] for slide_us in sorted(a.slide_us for a in plan.aggregates)}
    slots = []
    for aggregate in plan.aggregates:
        window = Window(names.index(aggregate.column), aggregate.window_us // aggregate.slide_us)
        shared = windows[aggregate.slide_us]
        if window not in shared:
            shared.append(window)
        slots.append(Slot(list(windows).index(aggregate.slide_us), shared.index(window)))
    return [PaneRing(slide_us, tuple(shared)) for slide_us, shared in windows.items()], slots


def watermarks(times: Ints, wanted: Bools, clock_us: int, delay_us: int, slides: Iterable[int]) -> tuple[Ints, Bools]:
    """The watermark [N] at each wanted event, and which of them are late: every pane they belong to is closed.

    The clock starts at `clock_us` and moves to each wanted event's time that is higher; the watermark follows by
    `delay_us`. An event moves the clock also where it is late, which cannot raise it.
    """
    clocks = np.maximum.accumulate(np.where(wanted, np.maximum(times, clock_us), clock_us))
    marks = clocks - delay_us
    late = wanted.copy()
    for slide_us in slides:
        late &= (times // slide_us + 1) * slide_us <= marks
    return marks, late


def _grown(array: npt.NDArray[T], keys: int, fill: int) -> npt.NDArray[T]:
    grown = np.zeros((keys, *array.shape[1:]), dtype=array.dtype)
    grown[: len(array)] = array
    grown[len(array) :] = fill
    return grown


@kernel
def _add(
    ids: Ints,
    times: Ints,
    marks: Ints,
    values: Floats,
    present: Bools,
    columns: Ints,
    slide_us: int,
    newest: Ints,
    cells: Floats,
) -> None:
    size = cells.shape[1]
    for row in range(len(ids)):
        key = ids[row]
        if key < 0:
            continue
        pane = times[row] // slide_us
        if (pane + 1) * slide_us <= marks[row] or pane <= newest[key] - size:
            continue
        slot = pane % size
        if pane > newest[key]:
            cleared = slot
            for _ in range(min(pane - newest[key], size)):
                cells[key, cleared] = 0.0
                cleared = cleared - 1 if cleared > 0 else size - 1
            newest[key] = pane
        for at in range(len(columns)):
            if present[row, columns[at]]:
                cells[key, slot, at, _COUNT] += 1.0
                cells[key, slot, at, _SUM] += values[row, columns[at]]


@kernel
def _merge(
    ids: Ints,
    current: int,
    slide_us: int,
    windows: Ints,
    newest: Ints,
    cells: Floats,
    due_us: Ints,
    count_out: Ints,
    sum_out: Floats,
) -> None:
    size = cells.shape[1]
    for row in range(len(ids)):
        key = ids[row]
        for window in range(len(windows)):
            column, panes = windows[window, 0], windows[window, 1]
            count, total, oldest = 0.0, 0.0, _NO_PANE
            first = max(current - panes, newest[key] - size) + 1
            slot = first % size
            for pane in range(first, min(current, newest[key]) + 1):
                here = cells[key, slot, column, _COUNT]
                if here > 0.0:
                    count += here
                    total += cells[key, slot, column, _SUM]
                    if oldest == _NO_PANE:
                        oldest = pane
                slot = slot + 1 if slot + 1 < size else 0
            count_out[row, window] = int(count)
            sum_out[row, window] = total
            if oldest != _NO_PANE:
                due_us[key] = min(due_us[key], (oldest + panes) * slide_us)
