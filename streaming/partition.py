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
from streaming.decode import Columns
from streaming.entities import NO_EVENT, NONE, Entities
from streaming.frames import grain_us
from streaming.plan import Plan
from streaming.records import Bools, Drift, Emission, Floats, Ints, RecordBatch, Reject, RejectKind, iso
from streaming.state import StateError, pack, unpack
from streaming.transformations import Reader
from streaming.windows import NEVER_US

if TYPE_CHECKING:
    from streaming.learning import Models


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
        self._entities = Entities(plan)
        self._shortest_us = min(grain_us(aggregate) for aggregate in plan.aggregates)
        self._final = plan.emission == "final"
        self._kept = 0
        self._marked: list[_Marked] = []

    @property
    def watermark_us(self) -> int:
        """No event is expected below it: the clock less the delay of the plan."""
        return self.clock_us - self.plan.delay_us

    @property
    def counters(self) -> Counters:
        """What has been done since the first record."""
        return Counters(self._processed, self._dead, self._late, len(self._entities))

    @property
    def learning(self) -> tuple[int, int]:
        """How many events the models have followed, and how often they have detected drift."""
        return (0, 0) if self._models is None else (self._models.followed, self._models.detections)

    @property
    def state_bytes(self) -> int:
        """Memory that the state takes."""
        return self._bytes_of(len(self._entities.due_us))

    @property
    def panes(self) -> int:
        """Panes, sessions and last events that are kept."""
        return self._entities.held

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

    def closed(self, times: Ints, marks: Ints) -> Bools:
        """Which events [N] are too late for every window at the watermark [N] of each."""
        return self._entities.closed(times, marks)

    def tick(self, now_us: int) -> None:
        """Moves the clock on by the wall-clock time since the last event.

        Only for a partition that has been read to its end: what still waits in Kafka would come late.
        """
        if self._last_event_now_us == -NEVER_US:
            return
        self.clock_us = max(self.clock_us, self._last_event_clock_us + now_us - self._last_event_now_us)
        self._entities.tick(now_us)

    def leave_out(self, wall_us: int) -> None:
        """Lets `tick` not count so much of the wall-clock time since the last event: a step, or a broker away."""
        if self._last_event_now_us != -NEVER_US:
            self._last_event_now_us += wall_us
        self._entities.leave_out(wall_us)

    def mark(self) -> None:
        """Notes the features of every entity that changed since the last call, by an event or by the clock."""
        if self._final:
            self._finish(self.watermark_us)
            return
        clocks = self._entities.clocks
        if clocks is None:
            ids = self._entities.due(self.clock_us)
            self._note(ids, np.full(len(ids), self.clock_us, dtype=np.int64))
        else:
            ids = self._entities.due(clocks.now_us[: len(self._entities)])
            self._note(ids, clocks.now_us[ids])

    def take(self) -> Emission:
        """What was noted since the last call, in that order."""
        entities = self._entities
        marked, self._marked = self._marked or [_Marked(NONE, NONE, entities.read(NONE, NONE))], []
        ids = np.concatenate([each.ids for each in marked])
        merged = [np.concatenate(parts) for parts in zip(*(each.merged for each in marked), strict=True)]
        columns = [
            features.column(self.plan, aggregate, reading, merged[frame], entities.texts)
            for aggregate, (frame, reading) in zip(self.plan.aggregates, entities.readings, strict=True)
        ]
        table = pa.Table.from_arrays(columns, names=[aggregate.name for aggregate in self.plan.aggregates])
        moments_us = np.concatenate([each.moments_us for each in marked])
        return Emission(entities.keys.entities(ids, self.plan.entity_type), moments_us, table)

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
        self._forget()
        return self._packed("snapshot", self._entities.snapshot())

    def delta(self) -> bytes:
        """What changed since the last snapshot or delta of this object.

        Raises:
            StateError: Something was renumbered since, so that the state must be saved whole.
        """
        if self._entities.renumbered:
            raise StateError(f"Partition {self.partition} of view '{self.plan.view}' has to be saved whole.")
        return self._packed("delta", self._entities.delta())

    def shrink(self) -> None:
        """Forgets what nothing needs once there is twice as much as after the last time: for who saves no state."""
        if not self._marked and self._entities.numbered >= 2 * self._kept:
            self._forget()
            self._kept = self._entities.numbered

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

    def _judge(self, columns: Columns, seen: Bools, wanted: Bools) -> _Judged:
        times = columns.times
        clocks = np.maximum.accumulate(np.where(seen, np.maximum(times, self.clock_us), self.clock_us))
        clocks_of_keys = self._entities.clocks
        if clocks_of_keys is not None:
            known = self._identify(columns, seen & wanted)
            newest, anew = self._returns(known, times, seen)
            marks = clocks_of_keys.marks(known, times, anew) - self.plan.delay_us
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
        idleness = self._entities.idleness
        if idleness is None:
            return NONE, NO_EVENT
        newest = idleness.newest(times, seen)
        return newest, idleness.anew(ids, newest)

    def _identify(self, columns: Columns, wanted: Bools) -> Ints:
        ids = self._entities.number(columns, wanted)
        self._reserve(int(wanted.sum()))
        return ids

    def _fill(self, columns: Columns, judged: _Judged, rows: slice, now_us: int) -> None:
        """Adds some events to all windows, and moves the clocks of their entities."""
        entities, ids, marks = self._entities, judged.ids[rows], judged.marks[rows]
        values, present = columns.values[rows], columns.present[rows]
        entities.add(ids, columns.times[rows], marks, values, present, judged.anew[rows])
        if entities.idleness is not None:
            entities.idleness.hear(judged.known[rows], judged.newest[rows])
        if entities.clocks is not None:
            entities.clocks.move(ids, marks + self.plan.delay_us, now_us)

    def _finish(self, mark_us: int) -> None:
        """Notes the final windows that end at or before a watermark, each entity's in order of time."""
        while len(ids := self._entities.due(mark_us)):
            self._note(ids, self._entities.due_us[ids])

    def _note(self, ids: Ints, moments_us: Ints) -> None:
        if len(ids):
            self._marked.append(_Marked(ids, moments_us, self._entities.read(ids, moments_us)))

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

    def _forget(self) -> None:
        """Renumbers entities and texts unless a number waits; what is saved next must be a snapshot."""
        if not self._marked:
            self._entities.forget(self.watermark_us)

    def _reserve(self, events: int) -> None:
        """Makes room for the entities that are known, and for what so many more events can need."""
        room = self._entities.room
        if self._allowance is not None:
            needed, holder = self._bytes_of(room, events), (self.plan.view, self.partition)
            if not self._allowance.grant(holder, needed, self.state_bytes):
                raise StateError(
                    f"Partition {self.partition} of view '{self.plan.view}' holds {len(self._entities):,} entities and"
                    f" needs {needed / 2**20:,.0f} MiB for more; {self._allowance.limits(holder)}, or shorten the"
                    " windows."
                )
        self._entities.reserve(room, events)

    def _bytes_of(self, keys: int, events: int = 0) -> int:
        models = 0 if self._models is None else self._models.nbytes
        return models + self._entities.nbytes(keys, events)

    def _header(self, kind: str) -> dict[str, Any]:
        idleness, clocks = self._entities.idleness, self._entities.clocks
        return {
            "kind": kind,
            "fingerprint": self.plan.fingerprint,
            "partition": self.partition,
            "next_offset": self.next_offset,
            "clock_us": self.clock_us,
            "last_event": [self._last_event_clock_us, self._last_event_now_us],
            "newest_us": idleness and idleness.newest_us,
            "ticked_us": clocks and clocks.ticked_us,
            "counters": [self._processed, self._dead, self._late],
            "river": self._models and self._models.version,
        }

    def _packed(self, kind: str, arrays: list[npt.NDArray[Any]]) -> bytes:
        """The arrays of entities, and behind them those of the models."""
        models = [] if self._models is None else self._models.state()
        return pack(self._header(kind), [*arrays, *models])

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
        rest, entities = iter(arrays), self._entities
        entities.extend(rest)
        self._reserve(0)
        entities.restore(rest, whole=header["kind"] == "snapshot")
        if entities.idleness is not None:
            entities.idleness.newest_us = header["newest_us"]
        if entities.clocks is not None:  # a delta lacks those that no event has changed
            entities.tick(header["ticked_us"])
        if self._models is not None:
            self._models.restore(rest)


def _models(plan: Plan) -> "Models | None":
    """The models of a plan that has some; river takes seconds to import."""
    if not plan.models:
        return None
    from streaming.learning import Models

    return Models(plan)
