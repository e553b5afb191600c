"""One partition of one view: records in, features out, everything restorable.

The clock of a partition is the largest event time it has seen; without events it goes on as time passes.
A fresh value belongs to the clock, so it changes in two ways: by an event, or by a pane that leaves its window. A final
value belongs to the end of a window and is made when the watermark passes it.
"""

from collections.abc import Iterator
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from streaming import features
from streaming.allowance import Allowance
from streaming.cells import grown
from streaming.compile_kernels import kernel
from streaming.decode import Columns
from streaming.frames import frames, grain_us
from streaming.idleness import Idleness
from streaming.key_clocks import KeyClocks
from streaming.keys import KeyIndex
from streaming.memory import address, prefetch
from streaming.plan import Plan
from streaming.records import Bools, Drift, Emission, Floats, Ints, RecordBatch, Reject, RejectKind, iso
from streaming.state import StateError, pack, unpack
from streaming.transformations import Reader
from streaming.windows import NEVER_US

if TYPE_CHECKING:
    from streaming.learning import Models

_CHANGED_US = -NEVER_US
_FEW = 10_000
_AHEAD = 16
_NONE = np.zeros(0, dtype=np.int64)
_NO_EVENT = np.zeros(0, dtype=np.bool_)


class Counters(NamedTuple):
    """What a partition has done since its first record; `processed` counts every record, dead and late ones too."""

    processed: int
    dead: int
    late: int
    keys: int


class _Judged(NamedTuple):
    """What is known of N records before any is added.

    Attributes:
        known: The entity that each updates, also of those that are late by the entity's own clock, else -1.
        ids: The same without any that are late.
        clocks: The clock of the partition.
        marks: The watermark.
        late: Those that are.
        newest: The largest event time of the partition; empty where no entity is forgotten by its idleness.
        anew: Which ones begin their entity anew; empty where `newest` is.
    """

    known: Ints
    ids: Ints
    clocks: Ints
    marks: Ints
    late: Bools
    newest: Ints
    anew: Bools


class _Marked(NamedTuple):
    """Entities [M], a moment each, and what each frame's windows hold there [M, O]."""

    ids: Ints
    moments_us: Ints
    merged: list[Floats]


class Partition:
    """The state of one partition of a view; not safe for use by two threads.

    Args:
        plan: What is computed.
        partition: Its number in Kafka.
        allowance: Memory that its worker grants; more is refused.

    Attributes:
        next_offset: The offset to read next.
        clock_us: Event time of the partition, microseconds; below zero by 146,000 years before the first event.
        drifts: What models have detected in the piece that was taken last.
    """

    def __init__(self, plan: Plan, partition: int, allowance: Allowance | None = None) -> None:
        self.plan = plan
        self.partition = partition
        self.next_offset = 0
        self.clock_us = -NEVER_US
        self._allowance = allowance
        self._processed = self._dead = self._late = 0
        self._last_event_clock_us = self._last_event_now_us = -NEVER_US
        self._reader = Reader(plan)
        self._models = _models(plan)
        self.drifts: list[Drift] = []
        self._keys = KeyIndex()
        self._texts = {at: KeyIndex() for at, column in enumerate(plan.columns) if column.role == "text"}
        self._frames, self._readings = frames(plan)
        self._shortest_us = min(grain_us(aggregate) for aggregate in plan.aggregates)
        self._final = plan.emission == "final"
        self._clocks = KeyClocks() if plan.clocks == "key" else None
        forgets = plan.idle_ttl_us and (self._clocks is not None or any(frame.lasting for frame in self._frames))
        self._idleness = Idleness(plan.idle_ttl_us) if forgets else None
        self._due_us = np.zeros(0, dtype=np.int64)
        self._changed = np.zeros(0, dtype=np.bool_)
        self._note_told()
        self._renumbered = False
        self._kept = 0
        self._marked: list[_Marked] = []

    @property
    def watermark_us(self) -> int:
        """No event is expected below it: the clock less the delay of the plan."""
        return self.clock_us - self.plan.delay_us

    @property
    def counters(self) -> Counters:
        """What has been done since the first record."""
        return Counters(self._processed, self._dead, self._late, len(self._keys))

    @property
    def learning(self) -> tuple[int, int]:
        """How many events the models have followed, and how often they have detected drift."""
        return (0, 0) if self._models is None else (self._models.followed, self._models.detections)

    @property
    def state_bytes(self) -> int:
        """Memory that the state takes."""
        return self._bytes_of(len(self._due_us))

    @property
    def panes(self) -> int:
        """Panes, sessions and last events that are kept."""
        return sum(frame.held for frame in self._frames)

    def process(self, batch: RecordBatch, now_us: int) -> list[Reject]:
        """Takes the records of all `pieces` and returns those that changed nothing, in offset order."""
        return [reject for rejects in self.pieces(batch, now_us) for reject in rejects]

    def pieces(self, batch: RecordBatch, now_us: int) -> Iterator[list[Reject]]:
        """Takes records in offset order, piece by piece; those below `next_offset` were taken before and are skipped.

        A piece ends where the clock enters another pane of the shortest slide; where the first record does so, the
        first piece is empty. Who calls `mark` after each piece but the last of a batch gets the features as they were
        once in every pane, whatever the size of the batches.

        Args:
            batch: Of this partition.
            now_us: The wall clock; an event too far ahead of it is dead and does not move the partition clock.

        Yields:
            The records of the piece that changed nothing, in offset order.
        """
        batch = batch.rows(slice(int(np.searchsorted(batch.offsets, self.next_offset)), None))
        if len(batch.offsets) == 0:
            return
        columns, unread = self._reader.decode(batch)
        for refused in self.add(columns, batch.offsets, now_us):
            rows = np.searchsorted(batch.offsets, [reject.offset for reject in refused]).tolist()
            named = [
                reject._replace(key=batch.key(row), value=batch.value(row))
                for reject, row in zip(refused, rows, strict=True)
            ]
            dead = list(takewhile(lambda reject: reject.offset < self.next_offset, unread))
            del unread[: len(dead)]
            yield sorted([*named, *dead], key=lambda reject: reject.offset)

    def add(self, columns: Columns, offsets: Ints, now_us: int, mine: Bools | None = None) -> Iterator[list[Reject]]:
        """Takes decoded records in offset order, piece by piece as `pieces` does.

        Args:
            columns: Of N records.
            offsets: [N] rising, none below `next_offset`.
            now_us: The wall clock.
            mine: [N], the records that update an entity and are counted; the clock follows the others too, so that
                several partitions can share out the entities of one. Default: all.

        Yields:
            Those of mine that are from the future or late, in offset order and without key and value; the unreadable
            ones are counted here and known to who decoded them.
        """
        mine = np.ones(len(offsets), dtype=np.bool_) if mine is None else mine
        future = columns.readable & (columns.times > now_us + self.plan.future_us)
        seen = columns.readable & ~future
        judged = self._judge(columns, seen, mine & columns.kept)
        clocks, marks, late = judged.clocks, judged.marks, judged.late
        rejects = self._refusals(offsets, "dead", future & mine, columns.times, np.full(len(marks), now_us))
        rejects += self._refusals(offsets, "late", late, columns.times, marks)
        rejects.sort(key=lambda reject: reject.offset)
        grains = clocks // self._shortest_us
        ends = [*(np.flatnonzero(np.diff(grains)) + 1).tolist(), len(grains)]
        if self._last_event_now_us != -NEVER_US and grains[0] > self.clock_us // self._shortest_us:
            self.drifts = []
            yield []
        for start, end in pairwise([0, *ends]):
            rows = slice(start, end)
            if self._final:
                self._finish(int(marks[start]))
            if self._models is not None:
                followed = start + np.flatnonzero(seen[rows] & columns.kept[rows])
                self.drifts = self._models.follow(columns, followed, offsets, self.partition)
            self._fill(columns, judged, rows, now_us)
            if seen[rows].any():
                self.clock_us = int(clocks[end - 1])
                self._last_event_clock_us, self._last_event_now_us = self.clock_us, now_us
            self.next_offset = int(offsets[end - 1]) + 1
            refused = list(takewhile(lambda reject: reject.offset < self.next_offset, rejects))
            del rejects[: len(refused)]
            self._processed += int(mine[rows].sum())
            self._late += int(late[rows].sum())
            self._dead += int((mine[rows] & ~seen[rows]).sum())
            yield refused

    def tick(self, now_us: int) -> None:
        """Moves the clock on by the wall-clock time since the last event.

        Only for a partition that has been read to its end: what still waits in Kafka would come late.
        """
        if self._last_event_now_us == -NEVER_US:
            return
        self.clock_us = max(self.clock_us, self._last_event_clock_us + now_us - self._last_event_now_us)
        if self._clocks is not None:
            self._clocks.tick(len(self._keys), now_us)

    def leave_out(self, wall_us: int) -> None:
        """Lets `tick` not count so much of the wall-clock time since the last event: a step, or a broker away."""
        if self._last_event_now_us != -NEVER_US:
            self._last_event_now_us += wall_us
        if self._clocks is not None:
            self._clocks.leave_out(len(self._keys), wall_us)
            self._changed[: len(self._keys)] = True

    def mark(self) -> None:
        """Notes the features of every entity that changed since the last call, by an event or by the clock."""
        if self._final:
            self._finish(self.watermark_us)
            return
        due_us = self._due_us[: len(self._keys)]
        if self._clocks is None:
            ids = np.flatnonzero(due_us <= self.clock_us)
            self._note(ids, np.full(len(ids), self.clock_us, dtype=np.int64))
        else:
            ids = np.flatnonzero(due_us <= self._clocks.now_us[: len(due_us)])
            self._note(ids, self._clocks.now_us[ids])

    def take(self) -> Emission:
        """What was noted since the last call, in that order."""
        marked, self._marked = self._marked or [self._read(_NONE, _NONE)], []
        ids = np.concatenate([each.ids for each in marked])
        merged = [np.concatenate(parts) for parts in zip(*(each.merged for each in marked), strict=True)]
        columns = [
            features.column(self.plan, aggregate, reading, merged[frame], self._texts)
            for aggregate, (frame, reading) in zip(self.plan.aggregates, self._readings, strict=True)
        ]
        table = pa.Table.from_arrays(columns, names=[aggregate.name for aggregate in self.plan.aggregates])
        moments_us = np.concatenate([each.moments_us for each in marked])
        return Emission(self._keys.entities(ids, self.plan.entity_type), moments_us, table)

    def emit(self) -> Emission:
        """The features of every entity that changed since the last call, behind what was noted before."""
        self.mark()
        return self.take()

    def drain(self) -> Emission:
        """What would still be emitted if no event came any more: of final windows all that have not ended."""
        if self._final:
            self._finish(NEVER_US - 1)
        return self.emit()

    def snapshot(self) -> bytes:
        """The whole state as bytes; equal histories give equal bytes. What nothing needs is forgotten before."""
        self.forget()
        self._renumbered = False
        known = np.arange(len(self._keys))
        arrays: list[Any] = [*self._keys.state(), *self._own(known)]
        for index in self._texts.values():
            arrays += index.state()
        return self._packed("snapshot", arrays, known)

    def delta(self) -> bytes:
        """What changed since the last snapshot or delta of this object.

        Raises:
            StateError: Something was renumbered since, so that the state must be saved whole.
        """
        if self._renumbered:
            raise StateError(f"Partition {self.partition} of view '{self.plan.view}' has to be saved whole.")
        ids = np.flatnonzero(self._changed[: len(self._keys)])
        arrays: list[Any] = [*self._keys.state(self._told_keys), ids, *self._own(ids)]
        for at, index in self._texts.items():
            arrays += index.state(self._told_texts[at])
        return self._packed("delta", arrays, ids)

    def forget(self) -> None:
        """Renumbers entities, then texts, that still matter: once more than half of many do not, and no number waits.

        What is saved next must be a snapshot.
        """
        if self._marked:
            return
        known = len(self._keys)
        if known >= _FEW:
            gone = self._gone(known)
            if 2 * int(gone.sum()) > known:
                self._keep(np.flatnonzero(~gone))
        for column, index in self._texts.items():
            if len(index) >= _FEW:
                self._texts[column] = index.without_unused([p for frame in self._frames for p in frame.texts(column)])
                self._renumbered |= self._texts[column] is not index

    def shrink(self) -> None:
        """Calls `forget` once entities and texts are twice as many as after the last time: for who saves no state."""
        if not self._marked and self._numbered >= 2 * self._kept:
            self.forget()
            self._kept = self._numbered

    @classmethod
    def restore(
        cls,
        plan: Plan,
        partition: int,
        snapshot: bytes,
        *deltas: bytes,
        allowance: Allowance | None = None,
    ) -> "Partition":
        """The partition that gave a snapshot and then deltas.

        Raises:
            StateError: They are of another plan, partition or version, or cut short.
        """
        restored = cls(plan, partition, allowance)
        for data in (snapshot, *deltas):
            header, arrays = unpack(data)
            restored._check(header)
            restored._take(header, arrays)
        return restored

    @property
    def _numbered(self) -> int:
        return len(self._keys) + sum(len(index) for index in self._texts.values())

    def _judge(self, columns: Columns, seen: Bools, wanted: Bools) -> _Judged:
        times = columns.times
        clocks = np.maximum.accumulate(np.where(seen, np.maximum(times, self.clock_us), self.clock_us))
        if self._clocks is not None:
            known = self._identify(columns, seen & wanted)
            newest, anew = self._returns(known, times, seen)
            marks = self._clocks.marks(known, times, anew) - self.plan.delay_us
            late = seen & wanted & self.closed(times, marks)
            return _Judged(known, np.where(late, -1, known), clocks, marks, late, newest, anew)
        marks = clocks - self.plan.delay_us
        late = seen & wanted & (times < marks)
        if late.any():
            late &= self.closed(times, marks)
        ids = self._identify(columns, seen & wanted & ~late)
        return _Judged(ids, ids, clocks, marks, late, *self._returns(ids, times, seen))

    def _returns(self, ids: Ints, times: Ints, seen: Bools) -> tuple[Ints, Bools]:
        """`newest` and `anew` of the events [N] of some entities."""
        if self._idleness is None:
            return _NONE, _NO_EVENT
        newest = self._idleness.newest(times, seen)
        return newest, self._idleness.anew(ids, newest)

    def closed(self, times: Ints, marks: Ints) -> Bools:
        """Which events [N] are too late for every window at the watermark [N] of each."""
        closed = np.ones(len(times), dtype=np.bool_)
        for frame in self._frames:
            closed &= frame.closed(times, marks)
        return closed

    def _identify(self, columns: Columns, wanted: Bools) -> Ints:
        ids = self._keys.ids(columns.text, columns.entities, wanted)
        for slot, (column, index) in enumerate(self._texts.items()):
            here = wanted & columns.present[:, column]
            columns.values[:, column] = index.ids(columns.text, columns.texts[:, slot], here)
        self._reserve(len(self._keys), int(wanted.sum()))
        return ids

    def _fill(self, columns: Columns, judged: _Judged, rows: slice, now_us: int) -> None:
        """Adds some events to all windows."""
        ids, times, marks, anew = judged.ids[rows], columns.times[rows], judged.marks[rows], judged.anew[rows]
        values, present = columns.values[rows], columns.present[rows]
        for frame in self._frames:
            forgotten = anew if frame.lasting or self._clocks is not None else _NO_EVENT
            frame.add(ids, times, marks, values, present, forgotten, self._due_us)
        _note_changed(ids, self._changed, self._due_us[: (not self._final) * len(self._due_us)])
        if self._idleness is not None:
            self._idleness.hear(judged.known[rows], judged.newest[rows])
        if self._clocks is not None:
            self._clocks.move(ids, times, anew, now_us)

    def _finish(self, mark_us: int) -> None:
        """Notes the final windows that end at or before a watermark, each entity's in order of time."""
        due_us = self._due_us[: len(self._keys)]
        while len(ids := np.flatnonzero(due_us <= mark_us)):
            self._note(ids, due_us[ids])

    def _note(self, ids: Ints, moments_us: Ints) -> None:
        if len(ids):
            self._due_us[ids] = NEVER_US
            self._changed[ids] = True
            self._marked.append(self._read(ids, moments_us))

    def _read(self, ids: Ints, moments_us: Ints) -> _Marked:
        return _Marked(ids, moments_us, [frame.merge(ids, moments_us, self._due_us) for frame in self._frames])

    def _refusals(self, offsets: Ints, kind: RejectKind, rows: Bools, times: Ints, than: Ints) -> list[Reject]:
        reasons = {"dead": "is from the future: the clock says", "late": "is late: its windows had closed at watermark"}
        return [
            Reject(
                kind,
                self.partition,
                int(offsets[row]),
                f"event time {iso(int(times[row]))} {reasons[kind]} {iso(int(than[row]))}",
                None,
                None,
            )
            for row in np.flatnonzero(rows).tolist()
        ]

    def _gone(self, known: int) -> Bools:
        """Which entities would be the same at their next event if they were not known."""
        gone: Bools = self._due_us[:known] == NEVER_US
        if self._clocks is not None:  # they decide what is late
            gone &= self._idleness is not None and self._idleness.silent(known)
            return gone
        for frame in self._frames:
            empty = frame.empty(known, self.watermark_us)
            if frame.lasting and self._idleness is not None:
                empty |= self._idleness.silent(known)
            gone &= empty
        return gone

    def _keep(self, ids: Ints) -> None:
        """Forgets all entities but those of `ids`, which become 0, 1, ... in this order."""
        self._keys = self._keys.kept(ids)
        for kept in (*self._frames, self._idleness, self._clocks):
            if kept is not None:
                kept.keep(ids)
        self._due_us, self._changed = self._due_us[ids], self._changed[ids]
        self._renumbered = True

    def _reserve(self, keys: int, events: int) -> None:
        """Makes room for so many entities, and for what so many more events can need."""
        capacity = len(self._due_us) if keys <= len(self._due_us) else max(keys, 2 * len(self._due_us))
        if self._allowance is not None:
            needed, holder = self._bytes_of(capacity, events), (self.plan.view, self.partition)
            if not self._allowance.grant(holder, needed, self.state_bytes):
                others, limit = self._allowance.others_bytes(holder), self._allowance.limit_bytes
                raise StateError(
                    f"Partition {self.partition} of view '{self.plan.view}' holds {keys:,} entities and needs"
                    f" {needed / 2**20:,.0f} MiB for more; others of its worker take {others / 2**20:,.0f}, and all"
                    f" together may take {limit / 2**20:,.0f}: raise the limit (--max-state-mb), add workers or"
                    " partitions, or shorten the windows."
                )
        for frame in self._frames:
            frame.reserve(capacity, events)
        if capacity == len(self._due_us):
            return
        for clocks in (self._idleness, self._clocks):
            if clocks is not None:
                clocks.reserve(capacity)
        self._due_us = grown(self._due_us, capacity, NEVER_US)
        self._changed = grown(self._changed, capacity, 0)

    def _bytes_of(self, keys: int, events: int = 0) -> int:
        indexes = self._keys.nbytes + sum(index.nbytes for index in self._texts.values())
        models = 0 if self._models is None else self._models.nbytes
        own = 9 + sum(clocks.nbytes for clocks in (self._idleness, self._clocks) if clocks is not None)
        return own * keys + indexes + models + sum(frame.nbytes(keys, events) for frame in self._frames)

    def _header(self, kind: str) -> dict[str, Any]:
        return {
            "kind": kind,
            "fingerprint": self.plan.fingerprint,
            "partition": self.partition,
            "next_offset": self.next_offset,
            "clock_us": self.clock_us,
            "last_event": [self._last_event_clock_us, self._last_event_now_us],
            "newest_us": self._idleness and self._idleness.newest_us,
            "ticked_us": self._clocks and self._clocks.ticked_us,
            "counters": [self._processed, self._dead, self._late],
            "river": self._models and self._models.version,
        }

    def _packed(self, kind: str, arrays: list[Any], ids: Ints) -> bytes:
        """Some arrays, and behind them what the frames hold of some entities and the models of all."""
        for frame in self._frames:
            arrays += frame.state(ids)
        if self._models is not None:
            arrays += self._models.state()
        self._changed[:] = False
        self._note_told()
        return pack(self._header(kind), arrays)

    def _note_told(self) -> None:
        self._told_keys = len(self._keys)
        self._told_texts = {at: len(index) for at, index in self._texts.items()}

    def _own(self, ids: Ints) -> list[npt.NDArray[Any]]:
        rows = [self._due_us[ids]]
        if self._idleness is not None:
            rows.append(self._idleness.state(ids))
        return rows if self._clocks is None else [*rows, *self._clocks.state(ids)]

    def _check(self, header: dict[str, Any]) -> None:
        where = f"The state of partition {self.partition} of view '{self.plan.view}'"
        if header["fingerprint"] != self.plan.fingerprint:
            raise StateError(
                f"{where} was made by another declaration of the view: start anew with --reset {self.plan.view}, which"
                " keeps the checkpoint aside."
            )
        if header["partition"] != self.partition:
            raise StateError(
                f"{where} is that of partition {header['partition']}: the checkpoint is in the wrong place."
            )
        if self._models is not None and header["river"] != self._models.version:
            raise StateError(
                f"{where} holds models of river {header['river']} and this is river {self._models.version}:"
                f" install that version, or start anew with --reset {self.plan.view}, which keeps the checkpoint"
                " aside."
            )

    def _take(self, header: dict[str, Any], arrays: list[npt.NDArray[Any]]) -> None:
        """Takes what `snapshot` or `delta` packed."""
        self.next_offset, self.clock_us = header["next_offset"], header["clock_us"]
        self._last_event_clock_us, self._last_event_now_us = header["last_event"]
        self._processed, self._dead, self._late = header["counters"]
        rest = iter(arrays)
        self._keys.extend(next(rest), next(rest))
        self._reserve(len(self._keys), 0)
        ids = np.arange(len(self._keys)) if header["kind"] == "snapshot" else next(rest)
        self._due_us[ids] = next(rest)
        if self._idleness is not None:
            self._idleness.newest_us = header["newest_us"]
            self._idleness.restore(ids, next(rest))
        if self._clocks is not None:
            self._clocks.restore(ids, [next(rest) for _ in range(3)])
            self._clocks.tick(len(self._keys), header["ticked_us"])  # a delta lacks those that no event has changed
        for index in self._texts.values():
            index.extend(next(rest), next(rest))
        for frame in self._frames:
            frame.restore(ids, [next(rest) for _ in frame.state(_NONE)])
        if self._models is not None:
            self._models.restore(rest)
        self._note_told()


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


def _models(plan: Plan) -> "Models | None":
    """The models of a plan that has some; river takes seconds to import."""
    if not plan.models:
        return None
    from streaming.learning import Models

    return Models(plan)
