"""One partition of one view: records in, features out, everything restorable.

The clock of a partition is the largest event time it has seen; while no events come it goes on with the wall clock.
A fresh value belongs to the clock, so it changes in two ways: by an event, or by a pane that leaves its window.
"""

import json
import math
from collections.abc import Iterator
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from streaming.decode import Columns, Decoder
from streaming.keys import KeyIndex
from streaming.plan import Function, Plan
from streaming.records import Bools, Emission, Floats, Ints, RecordBatch, Reject, RejectKind
from streaming.windows import NEVER_US, rings, watermarks

_MAGIC = b"millrace state 1\n"
_CHANGED_US = -NEVER_US


class StateError(ValueError):
    """A snapshot that does not belong to this plan, partition or version of the format."""


class Counters(NamedTuple):
    """What a partition has done since its first record; `processed` counts every record, dead and late ones too."""

    processed: int
    dead: int
    late: int
    keys: int


class Partition:
    """The state of one partition of a view; not safe for use by two threads.

    Attributes:
        plan: What is computed.
        partition: Its number in Kafka.
        epoch: Which owner it is, for fencing; the computation does not use it and a snapshot does not hold it.
        next_offset: The offset to read next.
        clock_us: Event time of the partition, microseconds; below zero by 146,000 years before the first event.
    """

    def __init__(self, plan: Plan, partition: int, epoch: int = 0) -> None:
        self.plan = plan
        self.partition = partition
        self.epoch = epoch
        self.next_offset = 0
        self.clock_us = -NEVER_US
        self._processed = self._dead = self._late = 0
        self._last_event_clock_us = self._last_event_now_us = -NEVER_US
        self._decoder = Decoder(plan)
        self._keys = KeyIndex()
        self._rings, self._slots = rings(plan)
        self._due_us = np.zeros(0, dtype=np.int64)

    @property
    def watermark_us(self) -> int:
        """No event is expected below it: the clock less the delay of the plan."""
        return self.clock_us - self.plan.delay_us

    @property
    def counters(self) -> Counters:
        """What has been done since the first record."""
        return Counters(self._processed, self._dead, self._late, len(self._keys))

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
        columns, unread = self._decoder.decode(batch)
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

        Where the first of them enters another pane, the first piece is empty.

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
        slides = [ring.slide_us for ring in self._rings]
        marks, late = watermarks(columns.times, seen, self.clock_us, self.plan.delay_us, slides)
        future, late = future & mine, late & mine
        ids = self._keys.ids(columns.text, columns.entities, seen & mine & ~late)
        self._reserve(len(self._keys))
        limit = np.full(len(marks), now_us)
        number = self.partition
        rejects = _refusals(number, offsets, "dead", future, columns.times, limit, "is from the future: the clock says")
        rejects += _refusals(
            number, offsets, "late", late, columns.times, marks, "is late: its windows had closed at watermark"
        )
        rejects.sort(key=lambda reject: reject.offset)
        panes = (marks + self.plan.delay_us) // slides[0]
        ends = [*(np.flatnonzero(np.diff(panes)) + 1).tolist(), len(marks)]
        if self._last_event_now_us != -NEVER_US and panes[0] > self.clock_us // slides[0]:
            yield []
        for start, end in pairwise([0, *ends]):
            rows = slice(start, end)
            for ring in self._rings:
                ring.add(ids[rows], columns.times[rows], marks[rows], columns.values[rows], columns.present[rows])
            changed = ids[rows]
            self._due_us[changed[changed >= 0]] = _CHANGED_US
            if seen[rows].any():
                self.clock_us = int(marks[end - 1]) + self.plan.delay_us
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
        if self._last_event_now_us != -NEVER_US:
            self.clock_us = max(self.clock_us, self._last_event_clock_us + now_us - self._last_event_now_us)

    def emit(self) -> Emission:
        """The fresh features of every entity that had an event, or lost a pane from a window, since the last call."""
        known = len(self._keys)
        ids = np.flatnonzero(self._due_us[:known] <= self.clock_us)
        self._due_us[ids] = NEVER_US
        merged = [ring.merge(ids, self.clock_us, self._due_us) for ring in self._rings]
        names, columns = [], []
        for aggregate, slot in zip(self.plan.aggregates, self._slots, strict=True):
            counts, sums = merged[slot.ring]
            names.append(aggregate.name)
            columns.append(_feature(aggregate.function, counts[:, slot.window], sums[:, slot.window]))
        return Emission(
            entities=self._keys.entities(ids, self.plan.entity_type),
            event_time_us=np.full(len(ids), self.clock_us, dtype=np.int64),
            features=pa.Table.from_arrays(columns, names=names),
        )

    def drain(self) -> Emission:
        """What would still be emitted if the watermark went on for ever; for bounded input, after its last record."""
        return self.emit()

    def snapshot(self) -> bytes:
        """The whole state as bytes; equal histories give equal bytes."""
        arrays: list[Any] = [*self._keys.state(), self._due_us[: len(self._keys)]]
        for ring in self._rings:
            arrays += ring.state(len(self._keys))
        header = {
            "fingerprint": self.plan.fingerprint,
            "partition": self.partition,
            "next_offset": self.next_offset,
            "clock_us": self.clock_us,
            "last_event": [self._last_event_clock_us, self._last_event_now_us],
            "counters": [self._processed, self._dead, self._late],
            "arrays": [[array.dtype.str, list(array.shape)] for array in arrays],
        }
        return b"".join([_MAGIC, json.dumps(header).encode(), b"\n", *(array.tobytes() for array in arrays)])

    @classmethod
    def restore(cls, plan: Plan, partition: int, data: bytes, epoch: int = 0) -> "Partition":
        """The partition that gave a snapshot.

        Raises:
            StateError: It is of another plan, partition or version, or cut short.
        """
        header, arrays = _read_snapshot(data)
        where = f"The state of partition {partition} of view '{plan.view}'"
        if header["fingerprint"] != plan.fingerprint:
            raise StateError(
                f"{where} was made by another declaration of the view: remove the checkpoint to start anew."
            )
        if header["partition"] != partition:
            raise StateError(
                f"{where} is that of partition {header['partition']}: the checkpoint is in the wrong place."
            )
        restored = cls(plan, partition, epoch)
        restored.next_offset = header["next_offset"]
        restored.clock_us = header["clock_us"]
        restored._last_event_clock_us, restored._last_event_now_us = header["last_event"]
        restored._processed, restored._dead, restored._late = header["counters"]
        text, starts, due_us, *panes = arrays
        restored._keys = KeyIndex.restored(text.copy(), starts)
        restored._due_us = due_us.copy()
        for at, ring in enumerate(restored._rings):
            ring.restore(*panes[2 * at : 2 * at + 2])
        return restored

    def _reserve(self, keys: int) -> None:
        for ring in self._rings:
            ring.reserve(keys)
        if keys > len(self._due_us):
            grown = np.full(max(keys, 2 * len(self._due_us)), NEVER_US, dtype=np.int64)
            grown[: len(self._due_us)] = self._due_us
            self._due_us = grown


def _read_snapshot(data: bytes) -> tuple[dict[str, Any], list[Any]]:
    if not data.startswith(_MAGIC):
        raise StateError("The state is not of this version of Millrace: remove the checkpoint to start anew.")
    start = data.find(b"\n", len(_MAGIC))
    try:
        header = json.loads(data[len(_MAGIC) : start])
        arrays = []
        at = start + 1
        for dtype, shape in header["arrays"]:
            count = math.prod(shape)
            arrays.append(np.frombuffer(data, dtype=dtype, count=count, offset=at).reshape(shape))
            at += arrays[-1].nbytes
    except ValueError:
        raise StateError("The state is cut short: go back to an older checkpoint.") from None
    return header, arrays


def _from_offset(batch: RecordBatch, offset: int) -> RecordBatch:
    first = int(np.searchsorted(batch.offsets, offset))
    if first == 0:
        return batch
    rows = (array[first:] for array in (batch.offsets, batch.keys, batch.values, batch.timestamps_ms))
    return RecordBatch(batch.partition, batch.buffer, *rows)


def _refusals(
    partition: int, offsets: Ints, kind: RejectKind, rows: Bools, times: Ints, than: Ints, reason: str
) -> list[Reject]:
    return [
        Reject(
            kind,
            partition,
            int(offsets[row]),
            f"event time {_iso(int(times[row]))} {reason} {_iso(int(than[row]))}",
            None,
            None,
        )
        for row in np.flatnonzero(rows).tolist()
    ]


def _iso(time_us: int) -> str:
    """ISO 8601 in UTC, also just outside the years that datetime knows (a time of year 1 or 9999 with an offset)."""
    return f"{np.datetime64(time_us, 'us')}Z"


def _feature(function: Function, counts: Ints, sums: Floats) -> pa.Array:
    match function:
        case "count":
            return pa.array(counts)
        case "sum":
            return pa.array(sums)
        case "mean":
            empty = counts == 0
            return pa.array(sums / np.where(empty, 1, counts), mask=empty)
