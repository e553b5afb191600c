"""One partition of one view: records in, features out, everything restorable.

The clock of a partition is the largest event time it has seen; while no events come it goes on with the wall clock.
A fresh value belongs to the clock, so it changes in two ways: by an event, or by a pane that leaves its window. A final
value belongs to the end of a window and is made when the watermark passes it.
"""

from collections.abc import Iterator
from itertools import pairwise, takewhile
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from streaming import features
from streaming.decode import Columns, Decoder
from streaming.key_clocks import KeyClocks
from streaming.keys import KeyIndex
from streaming.last_events import LastEvents
from streaming.plan import Aggregate, Plan
from streaming.records import Bools, Emission, Floats, Ints, RecordBatch, Reject, RejectKind
from streaming.sessions import Sessions
from streaming.state import StateError, pack, unpack
from streaming.windows import NEVER_US, PaneRing, Reading, grown

_CHANGED_US = -NEVER_US
_FEW_KEYS = 10_000
_NONE = np.zeros(0, dtype=np.int64)
_LIFETIME_GRAIN_US = 60_000_000


class Frame(Protocol):
    """Windows of one shape over all entities: `PaneRing`, `Sessions` or `LastEvents`."""

    readings: tuple[Reading, ...]

    @property
    def incremental(self) -> bool: ...  # noqa: D102
    def reserve(self, keys: int) -> None: ...  # noqa: D102
    def bytes_per_key(self) -> int: ...  # noqa: D102
    def pool_bytes(self) -> int: ...  # noqa: D102
    def closed(self, times: Ints, marks: Ints) -> Bools: ...  # noqa: D102
    def add(  # noqa: D102
        self, ids: Ints, times: Ints, marks: Ints, values: Floats, present: Bools, due_us: Ints
    ) -> None: ...
    def merge(self, ids: Ints, moments_us: Ints, due_us: Ints) -> Floats: ...  # noqa: D102
    def empty(self, keys: int, mark_us: int) -> Bools: ...  # noqa: D102
    def keep(self, ids: Ints) -> None: ...  # noqa: D102
    def state(self, ids: Ints | slice) -> list[npt.NDArray[Any]]: ...  # noqa: D102
    def restore(self, ids: Ints | slice, arrays: list[npt.NDArray[Any]]) -> None: ...  # noqa: D102


class Counters(NamedTuple):
    """What a partition has done since its first record; `processed` counts every record, dead and late ones too."""

    processed: int
    dead: int
    late: int
    keys: int


class Partition:
    """The state of one partition of a view; not safe for use by two threads.

    Args:
        plan: What is computed.
        partition: Its number in Kafka.
        epoch: Which owner it is, for fencing; the computation does not use it and a snapshot does not hold it.
        max_state_bytes: More memory than this is refused.

    Attributes:
        next_offset: The offset to read next.
        clock_us: Event time of the partition, microseconds; below zero by 146,000 years before the first event.
    """

    def __init__(self, plan: Plan, partition: int, epoch: int = 0, max_state_bytes: int | None = None) -> None:
        self.plan = plan
        self.partition = partition
        self.epoch = epoch
        self.next_offset = 0
        self.clock_us = -NEVER_US
        self._max_state_bytes = max_state_bytes
        self._processed = self._dead = self._late = 0
        self._last_event_clock_us = self._last_event_now_us = -NEVER_US
        self._decoder = Decoder(plan)
        self._keys = KeyIndex()
        self._texts = {at: KeyIndex() for at, column in enumerate(plan.columns) if column.role == "text"}
        self._frames, self._readings = _frames(plan)
        self._shortest_us = min((_grain_us(aggregate) for aggregate in plan.aggregates), default=_LIFETIME_GRAIN_US)
        self._final = plan.emission == "final"
        self._clocks = KeyClocks() if plan.clocks == "key" else None
        self._due_us = np.zeros(0, dtype=np.int64)
        self._seen_us = np.zeros(0, dtype=np.int64)
        self._changed = np.zeros(0, dtype=np.bool_)
        self._told_keys = 0
        self._finals: list[Emission] = []

    @property
    def watermark_us(self) -> int:
        """No event is expected below it: the clock less the delay of the plan."""
        return self.clock_us - self.plan.delay_us

    @property
    def counters(self) -> Counters:
        """What has been done since the first record."""
        return Counters(self._processed, self._dead, self._late, len(self._keys))

    @property
    def state_bytes(self) -> int:
        """Memory that the state takes."""
        return self._bytes_of(len(self._due_us))

    def process(self, batch: RecordBatch, now_us: int) -> list[Reject]:
        """Takes the records of all `pieces` and returns those that changed nothing, in offset order."""
        return [reject for rejects in self.pieces(batch, now_us) for reject in rejects]

    def pieces(self, batch: RecordBatch, now_us: int) -> Iterator[list[Reject]]:
        """Takes records in offset order, piece by piece; those below `next_offset` were taken before and are skipped.

        A piece ends where the clock enters another pane of the shortest slide. Who emits after each piece gets the
        features as they were once in every pane, whatever the size of the batches.

        Args:
            batch: Of this partition.
            now_us: The wall clock; an event too far ahead of it is dead and does not move the partition clock.

        Yields:
            The records of the piece that changed nothing, in offset order.
        """
        batch = _from_offset(batch, self.next_offset)
        if len(batch.offsets) == 0:
            return
        columns, rejects = self._decoder.decode(batch)
        future = columns.readable & (columns.times > now_us + self.plan.future_us)
        judged = self._judge(columns, columns.readable & ~future)
        marks, late, times = judged.marks, judged.late, columns.times
        limit = np.full(len(marks), now_us)
        rejects += _refusals(batch, "dead", future, times, limit, "is from the future: the clock says")
        rejects += _refusals(batch, "late", late, times, marks, "is late: its windows had closed at watermark")
        rejects.sort(key=lambda reject: reject.offset)
        for end in self._add(columns, judged, now_us):
            self.next_offset = int(batch.offsets[end - 1]) + 1
            refused = list(takewhile(lambda reject: reject.offset < self.next_offset, rejects))
            del rejects[: len(refused)]
            self._dead += sum(reject.kind == "dead" for reject in refused)
            yield refused

    def add(self, columns: Columns, offsets: Ints, now_us: int, mine: Bools | None = None) -> Iterator[tuple[int, int]]:
        """Takes events that are decoded already, piece by piece as `pieces`; unreadable ones only move the offset.

        Args:
            columns: [N] events.
            offsets: [N] of them.
            now_us: The wall clock, by which an idle partition's clock goes on.
            mine: [N] which events are taken; the others only move the clock, so that shards by entity share one.

        Yields:
            The first and last + 1 row of the piece.
        """
        start = 0
        for end in self._add(columns, self._judge(columns, columns.readable, mine), now_us):
            self.next_offset = int(offsets[end - 1]) + 1
            yield start, end
            start = end

    def tick(self, now_us: int) -> None:
        """Moves the clock on by the wall-clock time since the last event.

        Only for a partition that has been read to its end: what still waits in Kafka would come late.
        """
        if self._last_event_now_us == -NEVER_US:
            return
        self.clock_us = max(self.clock_us, self._last_event_clock_us + now_us - self._last_event_now_us)
        if self._clocks is not None:
            self._clocks.tick(len(self._keys), now_us)

    def emit(self) -> Emission:
        """The features of every entity that changed since the last call, by an event or by the clock."""
        if self._final:
            self._finish(self.watermark_us)
            emissions, self._finals = self._finals, []
            return _joined(emissions) if emissions else self._emission(_NONE, _NONE)
        due_us = self._due_us[: len(self._keys)]
        if self._clocks is None:
            ids = np.flatnonzero(due_us <= self.clock_us)
            return self._emission(ids, np.full(len(ids), self.clock_us, dtype=np.int64))
        ids = np.flatnonzero(due_us <= self._clocks.now_us[: len(due_us)])
        return self._emission(ids, self._clocks.now_us[ids])

    def drain(self) -> Emission:
        """What would still be emitted if no event came any more: of final windows all that have not ended."""
        if self._final:
            self._finish(NEVER_US - 1)
        return self.emit()

    def snapshot(self) -> bytes:
        """The whole state as bytes; equal histories give equal bytes. Entities without any state left are forgotten."""
        self._forget()
        known = slice(0, len(self._keys))
        arrays: list[Any] = [*self._keys.state(), *self._own(known)]
        for index in self._texts.values():
            arrays += index.state()
        for frame in self._frames:
            arrays += frame.state(known)
        self._changed[:] = False
        self._told_keys = len(self._keys)
        return pack(self._header("snapshot"), arrays)

    def delta(self) -> bytes:
        """What changed since the last snapshot or delta of this object; a snapshot where sketches or texts are kept."""
        if self._texts or not all(frame.incremental for frame in self._frames):
            return self.snapshot()
        ids = np.flatnonzero(self._changed[: len(self._keys)])
        arrays: list[Any] = [*self._keys.state(self._told_keys), ids, *self._own(ids)]
        for frame in self._frames:
            arrays += frame.state(ids)
        self._changed[:] = False
        self._told_keys = len(self._keys)
        return pack(self._header("delta"), arrays)

    @classmethod
    def restore(
        cls,
        plan: Plan,
        partition: int,
        snapshot: bytes,
        *deltas: bytes,
        epoch: int = 0,
        max_state_bytes: int | None = None,
    ) -> "Partition":
        """The partition that gave a snapshot and then deltas.

        Raises:
            StateError: They are of another plan, partition or version, or cut short.
        """
        restored = cls(plan, partition, epoch, max_state_bytes)
        for data in (snapshot, *deltas):
            header, arrays = unpack(data)
            restored._check(header)
            if header["kind"] == "snapshot":
                restored = cls(plan, partition, epoch, max_state_bytes)
            restored._take(header, arrays)
        return restored

    def _judge(self, columns: Columns, seen: Bools, mine: Bools | None = None) -> "_Judged":
        times = columns.times
        clocks = np.maximum.accumulate(np.where(seen, np.maximum(times, self.clock_us), self.clock_us))
        marks = clocks - self.plan.delay_us
        grains = clocks // self._shortest_us
        wanted = seen if mine is None else seen & mine
        if self._clocks is not None:
            ids = self._identify(columns, wanted)
            marks = self._clocks.marks(ids, times) - self.plan.delay_us
            late = wanted & self._closed(times, marks)
            return _Judged(np.where(late, -1, ids), seen, clocks, marks, grains, late)
        late = wanted & (times < marks)
        if late.any():
            late &= self._closed(times, marks)
        return _Judged(self._identify(columns, wanted & ~late), seen, clocks, marks, grains, late)

    def _closed(self, times: Ints, marks: Ints) -> Bools:
        closed = np.ones(len(times), dtype=np.bool_)
        for frame in self._frames:
            closed &= frame.closed(times, marks)
        return closed

    def _identify(self, columns: Columns, wanted: Bools) -> Ints:
        ids = self._keys.ids(columns.text, columns.entities, wanted)
        for slot, (column, index) in enumerate(self._texts.items()):
            here = wanted & columns.present[:, column]
            columns.values[:, column] = index.ids(columns.text, columns.texts[:, slot], here)
        self._reserve(len(self._keys))
        return ids

    def _add(self, columns: Columns, judged: "_Judged", now_us: int) -> Iterator[int]:
        """Adds the events piece by piece; yields the last + 1 row of each."""
        ends = [*(np.flatnonzero(np.diff(judged.grains)) + 1).tolist(), len(judged.ids)]
        for start, end in pairwise([0, *ends]):
            rows = slice(start, end)
            ids, times, marks = judged.ids[rows], columns.times[rows], judged.marks[rows]
            if self._final:
                self._finish(int(marks[0]))
            for frame in self._frames:
                frame.add(ids, times, marks, columns.values[rows], columns.present[rows], self._due_us)
            known = ids >= 0
            taken = ids[known]
            self._changed[taken] = True
            if not self._final:
                self._due_us[taken] = _CHANGED_US
            if self.plan.idle_ttl_us:
                np.maximum.at(self._seen_us, taken, times[known])
            if self._clocks is not None:
                self._clocks.move(taken, times[known], now_us)
            if judged.seen[rows].any():
                self.clock_us = int(judged.clocks[end - 1])
                self._last_event_clock_us, self._last_event_now_us = self.clock_us, now_us
            self._processed += end - start
            self._late += int(judged.late[rows].sum())
            yield end

    def _finish(self, mark_us: int) -> None:
        """Reads the final windows that end at or before a watermark, each entity's in order of time."""
        due_us = self._due_us[: len(self._keys)]
        while len(ids := np.flatnonzero(due_us <= mark_us)):
            self._finals.append(self._emission(ids, due_us[ids]))

    def _emission(self, ids: Ints, moments_us: Ints) -> Emission:
        self._due_us[ids] = NEVER_US
        self._changed[ids] = True
        merged = [frame.merge(ids, moments_us, self._due_us) for frame in self._frames]
        columns = [
            features.column(self.plan, aggregate, reading, merged[frame], self._texts)
            for aggregate, (frame, reading) in zip(self.plan.aggregates, self._readings, strict=True)
        ]
        table = pa.Table.from_arrays(columns, names=[aggregate.name for aggregate in self.plan.aggregates])
        return Emission(self._keys.entities(ids, self.plan.entity_type), moments_us, table)

    def _forget(self) -> None:
        """Renumbers the entities that still matter, once more than half of many do not."""
        known = len(self._keys)
        if known < _FEW_KEYS:
            return
        gone = self._due_us[:known] == NEVER_US
        for frame in self._frames:
            gone &= frame.empty(known, self.watermark_us)
        if self._clocks is not None:
            gone[:] = False
        if self.plan.idle_ttl_us:
            gone |= self._seen_us[:known] + self.plan.idle_ttl_us < self.clock_us
        if 2 * int(gone.sum()) <= known:
            return
        ids = np.flatnonzero(~gone)
        self._keys = self._keys.kept(ids)
        for frame in self._frames:
            frame.keep(ids)
        self._due_us, self._seen_us, self._changed = self._due_us[ids], self._seen_us[ids], self._changed[ids]
        if self._clocks is not None:
            self._clocks.keep(ids)
        for frame in self._frames:
            frame.reserve(len(ids))

    def _reserve(self, keys: int) -> None:
        if keys <= len(self._due_us):
            return
        capacity = max(keys, 2 * len(self._due_us))
        if self._max_state_bytes is not None and self._bytes_of(capacity) > self._max_state_bytes:
            raise StateError(
                f"Partition {self.partition} of view '{self.plan.view}' holds {keys:,} entities and needs"
                f" {self._bytes_of(capacity) / 2**20:,.0f} MiB for more, over its limit of"
                f" {self._max_state_bytes / 2**20:,.0f}: raise the limit, add partitions, or shorten the windows."
            )
        for frame in self._frames:
            frame.reserve(keys)
        if self._clocks is not None:
            self._clocks.reserve(capacity)
        self._due_us = grown(self._due_us, capacity, NEVER_US)
        self._seen_us = grown(self._seen_us, capacity, -NEVER_US)
        self._changed = grown(self._changed, capacity, 0)

    def _bytes_of(self, keys: int) -> int:
        each = 17 + sum(frame.bytes_per_key() for frame in self._frames)
        indexes = self._keys.nbytes + sum(index.nbytes for index in self._texts.values())
        return keys * each + indexes + sum(frame.pool_bytes() for frame in self._frames)

    def _header(self, kind: str) -> dict[str, Any]:
        return {
            "kind": kind,
            "fingerprint": self.plan.fingerprint,
            "partition": self.partition,
            "next_offset": self.next_offset,
            "clock_us": self.clock_us,
            "last_event": [self._last_event_clock_us, self._last_event_now_us],
            "counters": [self._processed, self._dead, self._late],
        }

    def _own(self, ids: Ints | slice) -> list[npt.NDArray[Any]]:
        rows = [self._due_us[ids], self._seen_us[ids]]
        return rows if self._clocks is None else [*rows, *self._clocks.state(ids)]

    def _check(self, header: dict[str, Any]) -> None:
        where = f"The state of partition {self.partition} of view '{self.plan.view}'"
        if header["fingerprint"] != self.plan.fingerprint:
            raise StateError(
                f"{where} was made by another declaration of the view: remove the checkpoint to start anew."
            )
        if header["partition"] != self.partition:
            raise StateError(
                f"{where} is that of partition {header['partition']}: the checkpoint is in the wrong place."
            )

    def _take(self, header: dict[str, Any], arrays: list[npt.NDArray[Any]]) -> None:
        """Takes what `snapshot` or `delta` packed."""
        self.next_offset, self.clock_us = header["next_offset"], header["clock_us"]
        self._last_event_clock_us, self._last_event_now_us = header["last_event"]
        self._processed, self._dead, self._late = header["counters"]
        rest = iter(arrays)
        self._keys.extend(next(rest), next(rest))
        self._reserve(len(self._keys))
        ids: Ints | slice = slice(0, len(self._keys)) if header["kind"] == "snapshot" else next(rest)
        self._due_us[ids], self._seen_us[ids] = next(rest), next(rest)
        if self._clocks is not None:
            self._clocks.restore(ids, [next(rest) for _ in range(3)])
        for index in self._texts.values():
            index.extend(next(rest), next(rest))
        for frame in self._frames:
            frame.restore(ids, [next(rest) for _ in frame.state(slice(0, 0))])
        self._told_keys = len(self._keys)


class _Judged(NamedTuple):
    """What is known of N events before they are added.

    Attributes:
        ids: [N] of the entities of those that are taken, -1 for the others.
        seen: [N] which of them move the clock.
        clocks: [N] of the partition, after each.
        marks: [N] the watermark of the partition, or of the entity, at each.
        grains: [N] number of the shortest slide that the clock is in.
        late: [N] which are refused because their windows have closed.
    """

    ids: Ints
    seen: Bools
    clocks: Ints
    marks: Ints
    grains: Ints
    late: Bools


def _frames(plan: Plan) -> tuple[list[Frame], list[tuple[int, Reading]]]:
    """The frames of a plan, shortest slide first, and the frame and reading of each aggregate."""
    groups: dict[tuple[str, int], list[tuple[int, Aggregate]]] = {}
    for aggregate in sorted(plan.aggregates, key=lambda each: (each.kind, each.slide_us)):
        shape = {"sliding": aggregate.slide_us, "session": aggregate.window_us, "last": aggregate.size, "lifetime": 0}
        group = groups.setdefault((aggregate.kind, shape[aggregate.kind]), [])
        group.append((plan.column_of(aggregate), aggregate))
    final = plan.emission == "final"
    history_us = plan.delay_us + plan.lateness_us
    frames: list[Frame] = []
    found: dict[str, tuple[int, Reading]] = {}
    for (kind, _), group in groups.items():
        if kind == "last":
            frames.append(LastEvents(group))
        elif kind == "session":
            frames.append(Sessions(group, plan.lateness_us, history_us, final))
        else:
            frames.append(PaneRing(group, plan.lateness_us, history_us if final else 0, final))
        for (_, aggregate), reading in zip(group, frames[-1].readings, strict=True):
            found[aggregate.name] = (len(frames) - 1, reading)
    return frames, [found[aggregate.name] for aggregate in plan.aggregates]


def _grain_us(aggregate: Aggregate) -> int:
    """How often at least the values of an aggregate are logged."""
    if aggregate.kind == "session":
        return aggregate.window_us
    return aggregate.slide_us if aggregate.kind == "sliding" else _LIFETIME_GRAIN_US


def _joined(emissions: list[Emission]) -> Emission:
    if len(emissions) == 1:
        return emissions[0]
    return Emission(
        pa.concat_arrays([emission.entities for emission in emissions]),
        np.concatenate([emission.event_time_us for emission in emissions]),
        pa.concat_tables([emission.features for emission in emissions]).combine_chunks(),
    )


def _from_offset(batch: RecordBatch, offset: int) -> RecordBatch:
    first = int(np.searchsorted(batch.offsets, offset))
    if first == 0:
        return batch
    rows = (array[first:] for array in (batch.offsets, batch.keys, batch.values, batch.timestamps_ms))
    return RecordBatch(batch.partition, batch.buffer, *rows)


def _refusals(batch: RecordBatch, kind: RejectKind, rows: Bools, times: Ints, than: Ints, reason: str) -> list[Reject]:
    return [
        Reject(
            kind,
            batch.partition,
            int(batch.offsets[row]),
            f"event time {_iso(int(times[row]))} {reason} {_iso(int(than[row]))}",
            batch.key(row),
            batch.value(row),
        )
        for row in np.flatnonzero(rows).tolist()
    ]


def _iso(time_us: int) -> str:
    """ISO 8601 in UTC, also just outside the years that datetime knows (a time of year 1 or 9999 with an offset)."""
    return f"{np.datetime64(time_us, 'us')}Z"
