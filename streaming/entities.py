"""What a partition holds of its entities: their numbers and texts, their windows, when these change, what changed."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from streaming.cells import grown
from streaming.compile_kernels import kernel
from streaming.decode import Columns
from streaming.frames import frames
from streaming.idleness import Idleness
from streaming.key_clocks import KeyClocks
from streaming.keys import KeyIndex
from streaming.memory import address, prefetch
from streaming.plan import Plan
from streaming.records import Bools, Floats, Ints
from streaming.windows import NEVER_US

_CHANGED_US = -NEVER_US
_FEW = 10_000
_AHEAD = 16
NONE = np.zeros(0, dtype=np.int64)
NO_EVENT = np.zeros(0, dtype=np.bool_)


class Entities:
    """The entities of one partition, numbered from 0 as they come; there is room for K of them.

    Attributes:
        keys: Their number by their name.
        texts: Of each column of texts that windows hold, the number of each text.
        readings: Of each aggregate the number of its frame, and where it is in what that frame gives.
        clocks: Of each entity; None where the clock of the partition is that of all.
        idleness: None where no entity is forgotten by its silence.
        due_us: [K] when the windows of each change next.
        renumbered: Whether entities or texts got other numbers since the last snapshot.
    """

    def __init__(self, plan: Plan) -> None:
        self._final = plan.emission == "final"
        self.keys = KeyIndex()
        self.texts = {at: KeyIndex() for at, column in enumerate(plan.columns) if column.role == "text"}
        self._frames, self.readings = frames(plan)
        self.clocks = KeyClocks() if plan.clocks == "key" else None
        forgets = plan.idle_ttl_us and (self.clocks is not None or any(frame.lasting for frame in self._frames))
        self.idleness = Idleness(plan.idle_ttl_us) if forgets else None
        self._key_arrays = [each for each in (self.idleness, self.clocks) if each is not None]
        self.due_us = np.zeros(0, dtype=np.int64)
        self._changed = np.zeros(0, dtype=np.bool_)
        self.renumbered = False
        self._note_told()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def held(self) -> int:
        """Panes, sessions and last events."""
        return sum(frame.held for frame in self._frames)

    @property
    def numbered(self) -> int:
        """Entities and texts that have a number."""
        return len(self.keys) + sum(len(index) for index in self.texts.values())

    @property
    def room(self) -> int:
        """For how many entities there will be room once there is for all that have a number."""
        there = len(self.due_us)
        return there if len(self) <= there else max(len(self), 2 * there)

    def nbytes(self, keys: int, events: int = 0) -> int:
        """Memory that is taken once there is room for so many entities and so many more events."""
        indexes = self.keys.nbytes + sum(index.nbytes for index in self.texts.values())
        own = self.due_us.itemsize + self._changed.itemsize + sum(each.nbytes for each in self._key_arrays)
        return own * keys + indexes + sum(frame.nbytes(keys, events) for frame in self._frames)

    def number(self, columns: Columns, wanted: Bools) -> Ints:
        """The entity [N] of each record, -1 of those that are not wanted, and texts as numbers; `reserve` follows."""
        ids = self.keys.ids(columns.text, columns.entities, wanted)
        for slot, (column, index) in enumerate(self.texts.items()):
            here = wanted & columns.present[:, column]
            columns.values[:, column] = index.ids(columns.text, columns.texts[:, slot], here)
        return ids

    def reserve(self, keys: int, events: int) -> None:
        """Makes room for so many entities, and for what so many more events can need."""
        for frame in self._frames:
            frame.reserve(keys, events)
        if keys > len(self.due_us):
            for each in self._key_arrays:
                each.reserve(keys)
            self.due_us = grown(self.due_us, keys, NEVER_US)
            self._changed = grown(self._changed, keys, 0)

    def closed(self, times: Ints, marks: Ints) -> Bools:
        """Which events [N] are too late for every window at the watermark [N] of each."""
        closed = np.ones(len(times), dtype=np.bool_)
        for frame in self._frames:
            closed &= frame.closed(times, marks)
        return closed

    def add(self, ids: Ints, times: Ints, marks: Ints, values: Floats, present: Bools, anew: Bools) -> None:
        """Adds N events in order to all windows, but for those of id -1; some begin their entity `anew`."""
        for frame in self._frames:
            forgotten = anew if frame.lasting or self.clocks is not None else NO_EVENT
            frame.add(ids, times, marks, values, present, forgotten, self.due_us)
        _note_changed(ids, self._changed, self.due_us[: (not self._final) * len(self.due_us)])

    def due(self, moments_us: Ints | int) -> Ints:
        """The entities whose windows change at a moment, or each at one of its own [len(self)], or before."""
        return np.flatnonzero(self.due_us[: len(self)] <= moments_us)

    def read(self, ids: Ints, moments_us: Ints) -> list[Floats]:
        """What each frame's windows of entities [M] hold at a moment [M] each, as [M, O]; notes when these change."""
        self.due_us[ids] = NEVER_US
        self._changed[ids] = True
        return [frame.merge(ids, moments_us, self.due_us) for frame in self._frames]

    def tick(self, wall_us: int) -> None:
        """Moves the clocks of entities on by the wall-clock time since their last event."""
        if self.clocks is not None:
            self.clocks.tick(len(self), wall_us)

    def leave_out(self, wall_us: int) -> None:
        """Lets `tick` not count so much of that time."""
        if self.clocks is not None:
            self.clocks.leave_out(len(self), wall_us)
            self._changed[: len(self)] = True

    def forget(self, watermark_us: int) -> None:
        """Renumbers entities, then texts, that still matter, once more than half of many do not."""
        if len(self) >= _FEW:
            gone = self._gone(watermark_us)
            if 2 * int(gone.sum()) > len(self):
                self._keep(np.flatnonzero(~gone))
        for column, index in self.texts.items():
            if len(index) >= _FEW:
                self.texts[column] = index.without_unused([p for frame in self._frames for p in frame.texts(column)])
                self.renumbered |= self.texts[column] is not index

    def snapshot(self) -> list[npt.NDArray[Any]]:
        """All that is known, for `extend` and `restore`."""
        self.renumbered = False
        texts = [array for index in self.texts.values() for array in index.state()]
        return [*self.keys.state(), *self._told(np.arange(len(self)), texts)]

    def delta(self) -> list[npt.NDArray[Any]]:
        """What is new since the last `snapshot` or `delta`, for `extend` and `restore`; nothing was `renumbered`."""
        ids = np.flatnonzero(self._changed[: len(self)])
        texts = [array for at, index in self.texts.items() for array in index.state(self._told_texts[at])]
        return [*self.keys.state(self._told_keys), ids, *self._told(ids, texts)]

    def extend(self, arrays: Iterator[npt.NDArray[Any]]) -> None:
        """Takes the entities of a `snapshot` or `delta`; `reserve` and `restore` follow."""
        self.keys.extend(next(arrays), next(arrays))

    def restore(self, arrays: Iterator[npt.NDArray[Any]], whole: bool) -> None:
        """Takes what is known of the entities of a `snapshot`, or else of a `delta`."""
        ids = np.arange(len(self)) if whole else next(arrays)
        self.due_us[ids] = next(arrays)
        for each in self._key_arrays:
            each.restore(ids, [next(arrays) for _ in each.state(NONE)])
        for index in self.texts.values():
            index.extend(next(arrays), next(arrays))
        for frame in self._frames:
            frame.restore(ids, [next(arrays) for _ in frame.state(NONE)])
        self._note_told()

    def _gone(self, watermark_us: int) -> Bools:
        """Which entities would be the same at their next event if they were not known."""
        known = len(self)
        gone: Bools = self.due_us[:known] == NEVER_US
        if self.clocks is not None:  # they decide what is late
            gone &= self.idleness is not None and self.idleness.silent(known)
            return gone
        for frame in self._frames:
            empty = frame.empty(known, watermark_us)
            if frame.lasting and self.idleness is not None:
                empty |= self.idleness.silent(known)
            gone &= empty
        return gone

    def _keep(self, ids: Ints) -> None:
        """Forgets all entities but those of `ids`, which become 0, 1, ... in this order."""
        self.keys = self.keys.kept(ids)
        for kept in (*self._frames, *self._key_arrays):
            kept.keep(ids)
        self.due_us, self._changed = self.due_us[ids], self._changed[ids]
        self.renumbered = True

    def _told(self, ids: Ints, texts: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """The arrays of some entities, with texts in their place among them."""
        arrays = [self.due_us[ids]]
        for each in self._key_arrays:
            arrays += each.state(ids)
        arrays += texts
        for frame in self._frames:
            arrays += frame.state(ids)
        self._note_told()
        return arrays

    def _note_told(self) -> None:
        self._changed[:] = False
        self._told_keys = len(self.keys)
        self._told_texts = {at: len(index) for at, index in self.texts.items()}


@kernel
def _note_changed(ids: Ints, changed: Bools, due_us: Ints) -> None:
    """Marks the entities of N events, but for those of id -1, as changed, and as due where there is `due_us` [K]."""
    due_base = address(due_us)
    for row in range(len(ids)):
        if row + _AHEAD < len(ids):
            prefetch(due_base + 8 * ids[row + _AHEAD])
        if ids[row] >= 0:
            changed[ids[row]] = True
            if len(due_us):
                due_us[ids[row]] = _CHANGED_US
