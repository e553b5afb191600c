"""One view over some partitions: poll, process, emit, write, checkpoint.

The order of every flush is what makes a crash at any point harmless. Rejects first (idempotent by partition and
offset), then the online store (keeps the newer event time), then the offline part (named by its offsets, removed when
it goes beyond the checkpoint), then the checkpoint (state and offset in one file), then the commit (advisory). What a
crash loses is computed again from the checkpoint by the same kernel over the same records, so it ends the same.
The online store is written as soon as there is something new, the last three about once a second.
"""

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

import orjson
from kafka.errors import KafkaError

from streaming.checkpoint import Checkpoint, CheckpointStore
from streaming.offline import OfflineLog
from streaming.partition import Partition
from streaming.plan import Plan
from streaming.records import Emission, RecordBatch, Reject

log = logging.getLogger(__name__)

POLL_S = 0.02
RECORDS_A_BATCH = 4_096
CHECKPOINT_S = 1.0
IDLE_S = 1.0
STATUS_S = 0.5
FLUSH_SHARE = 2  # after a flush of 10 ms the next one waits at least 2 x 10 ms
PENDING_ROWS = 250_000
PENDING_REJECTS = 10_000
KEYS_CHECKED = 100
BACKOFF_S = (0.2, 5.0)
BEGINNING_US = -(1 << 63)
SQLITE_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}
RETRIED = (KafkaError, sqlite3.OperationalError, OSError)


class WorkerError(ValueError):
    """Records that cannot be computed by partitions."""


class Source(Protocol):
    """What a worker needs of a consumer (`wire.Consumer`)."""

    def assign(self, partitions: Iterable[int]) -> None: ...  # noqa: D102
    def seek(self, partition: int, offset: int | None) -> int: ...  # noqa: D102
    def poll(self, timeout_s: float, max_records: int) -> list[RecordBatch]: ...  # noqa: D102
    def position(self, partition: int) -> int: ...  # noqa: D102
    def lag(self) -> dict[int, int]: ...  # noqa: D102
    def end_offsets(self) -> dict[int, int]: ...  # noqa: D102
    def commit(self, offsets: Mapping[int, int]) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Online(Protocol):
    """What a worker needs of an online sink (`sinks.OnlineSink`)."""

    def write(self, emissions: list[Emission]) -> int: ...  # noqa: D102
    def sync(self) -> None: ...  # noqa: D102


class Rejects(Protocol):
    """What a worker needs of a reject log (`rejects.RejectLog`)."""

    def write(self, rejects: list[Reject]) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


@dataclass
class _Held:
    """A partition and what waits to reach the offline log and the next checkpoint."""

    partition: Partition
    saved_offset: int
    restored: int
    rows: list[tuple[Emission, int]] = field(default_factory=list)
    last_record_s: float = 0.0


class Worker:
    """Computes one view over some partitions of its topic.

    Args:
        plan: what to compute.
        epoch: newer than that of every worker that held these partitions before.
        source: where records come from.
        online: where the newest row of each entity goes.
        offline: where every row goes.
        rejects: where refused records go.
        checkpoints: where state goes.
        ticking: let the clock of idle partitions advance with the wall clock; off for a run that ends when caught up,
            so that its outcome depends on the records only.
        keyed: refuse records whose key is not the entity (needed where the topic has several partitions).
        wall_us: wall clock in UTC microseconds.
        monotonic_s: clock for intervals.
    """

    def __init__(
        self,
        plan: Plan,
        epoch: int,
        *,
        source: Source,
        online: Online,
        offline: OfflineLog,
        rejects: Rejects,
        checkpoints: CheckpointStore,
        ticking: bool = True,
        keyed: bool = False,
        wall_us: Callable[[], int] = lambda: time.time_ns() // 1_000,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan = plan
        self.epoch = epoch
        self.stream = stream_name(plan)
        self._source, self._online, self._offline = source, online, offline
        self._rejects, self._checkpoints = rejects, checkpoints
        self._ticking = ticking
        self._keys_to_check = KEYS_CHECKED if keyed else 0
        self._wall_us, self._monotonic_s = wall_us, monotonic_s
        self._held: dict[int, _Held] = {}
        self._unflushed: list[Emission] = []
        self._refused: list[Reject] = []
        self._pending_rows = 0
        self._next_flush_s = self._next_checkpoint_s = self._next_status_s = 0.0
        self._started_s = self._ended_s = 0.0
        self._status: dict[int, dict[str, Any]] = {}

    def start(self, partitions: Iterable[int]) -> None:
        """Take the partitions over: claim, restore, remove offline parts beyond the checkpoint, seek.

        Raises:
            StaleEpochError: a newer worker has them.
            OffsetError: the topic was made again since the checkpoint.
            StateError: a checkpoint that does not fit the plan.
        """
        numbers = list(partitions)
        self._source.assign(numbers)
        for number in numbers:
            self._checkpoints.claim(self.stream, number, self.epoch)
            saved = self._checkpoints.load(self.stream, number)
            offset = self._source.seek(number, saved.offset if saved else None)
            if saved:
                partition = Partition.restore(self.plan, number, saved.state)
                removed = self._offline.truncate(number, saved.offset, saved.clock_us)
            else:
                partition = Partition(self.plan, number, self.epoch)
                removed = self._offline.truncate(number, offset, BEGINNING_US)
            now_s = self._monotonic_s()
            self._held[number] = _Held(partition, offset, partition.counters.processed, last_record_s=now_s)
            log.info(
                "partition taken",
                extra=self._about(number) | {"offset": offset, "restored": saved is not None, "parts_removed": removed},
            )
        self._started_s = self._ended_s = self._monotonic_s()
        self._refresh_status()

    def step(self, timeout_s: float = POLL_S) -> int:
        """Poll once, process what came, write what is due; returns the number of records read.

        Raises:
            KafkaError, sqlite3.OperationalError, OSError: something is away; nothing is lost, step again later.
            StaleEpochError: a newer worker has taken a partition over.
            WorkerError: records are not keyed by the entity.
        """
        now_s = self._monotonic_s()
        if self._unflushed:
            timeout_s = min(timeout_s, max(0.0, self._next_flush_s - now_s))
        batches = self._source.poll(timeout_s, RECORDS_A_BATCH)
        for batch in batches:
            self._process(batch)
        if self._ticking:
            self._tick()
        now_s = self._monotonic_s()
        if (self._unflushed or self._refused) and now_s >= self._next_flush_s:
            self.flush()
        full = self._pending_rows > PENDING_ROWS or len(self._refused) > PENDING_REJECTS
        if full or now_s >= self._next_checkpoint_s:
            self.checkpoint()
        if now_s >= self._next_status_s:
            self._refresh_status()
        return sum(len(batch.offsets) for batch in batches)

    def flush(self) -> None:
        """Write the rejects and the newest online values; what fails is kept for the next try."""
        started_s = self._monotonic_s()
        self._rejects.write(self._refused)
        self._refused = []
        if self._unflushed:
            self._online.write(self._unflushed)
            self._unflushed = []
        ended_s = self._monotonic_s()
        self._next_flush_s = ended_s + FLUSH_SHARE * (ended_s - started_s)

    def checkpoint(self) -> None:
        """Flush, write the offline parts, save state and offset of every partition that moved, commit."""
        self.flush()
        moved = [held for held in self._held.values() if held.rows or held.partition.next_offset > held.saved_offset]
        if moved:
            self._online.sync()
        for held in moved:
            partition, number = held.partition, held.partition.partition
            self._checkpoints.check(self.stream, number, self.epoch)
            self._offline.write(number, held.saved_offset, partition.next_offset, partition.clock_us, held.rows)
            state = Checkpoint(partition.next_offset, partition.clock_us, partition.snapshot())
            self._checkpoints.save(self.stream, number, self.epoch, state)
            held.rows, held.saved_offset = [], partition.next_offset
        if moved:
            self._source.commit({held.partition.partition: held.saved_offset for held in moved})
            self._ended_s = self._monotonic_s()
        self._pending_rows = sum(len(emission.entities) for held in self._held.values() for emission, _ in held.rows)
        self._next_checkpoint_s = self._monotonic_s() + CHECKPOINT_S

    def caught_up(self) -> bool:
        """Whether every record that the broker has now was processed; asks the broker.

        Raises:
            KafkaError: the broker did not answer.
        """
        return all(self._source.position(number) >= end for number, end in self._source.end_offsets().items())

    def run(self, stop: threading.Event, until_caught_up: bool) -> None:
        """Step until told to stop, or until there is nothing left to read; then checkpoint.

        A broker or store that is away is retried with growing pauses, for as long as it takes.
        """
        pause_s = BACKOFF_S[0]
        while not stop.is_set():
            try:
                if not self.step() and until_caught_up and self.caught_up():
                    break
                pause_s = BACKOFF_S[0]
            except RETRIED as error:
                if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode not in SQLITE_BUSY:
                    raise
                log.warning("trying again", extra={"view": self.plan.view, "pause_s": pause_s, "error": repr(error)})
                self._refresh_status()
                stop.wait(pause_s)
                pause_s = min(2 * pause_s, BACKOFF_S[1])
        self.checkpoint()
        self._refresh_status()
        log.info("stopped", extra={"view": self.plan.view, "epoch": self.epoch})

    def status(self) -> dict[int, dict[str, Any]]:
        """Partition to its figures, at most a second old; safe to call from another thread."""
        return self._status

    def close(self) -> None:
        """Leave the broker."""
        self._rejects.close()
        self._source.close()

    def _process(self, batch: RecordBatch) -> None:
        if self._keys_to_check > 0:
            check_keys(self.plan, batch)
            self._keys_to_check -= len(batch.offsets)
        held = self._held[batch.partition]
        for refused in held.partition.pieces(batch, self._wall_us()):
            self._refused.extend(refused)
            self._collect(held)
        held.last_record_s = self._monotonic_s()

    def _tick(self) -> None:
        """Let the clock of partitions advance that were read to their end and have been idle for a while."""
        now_s = self._monotonic_s()
        idle = [held for held in self._held.values() if now_s - held.last_record_s >= IDLE_S]
        lags = self._source.lag() if idle else {}
        for held in idle:
            if lags[held.partition.partition] == 0:
                held.partition.tick(self._wall_us())
                self._collect(held)
            held.last_record_s = now_s

    def _collect(self, held: _Held) -> None:
        emission = held.partition.emit()
        if len(emission.entities):
            self._unflushed.append(emission)
            held.rows.append((emission, self._wall_us()))
            self._pending_rows += len(emission.entities)

    def _refresh_status(self) -> None:
        self._next_status_s = self._monotonic_s() + STATUS_S
        lags = self._source.lag()
        heartbeat = datetime.fromtimestamp(self._wall_us() / 1e6, UTC).isoformat()
        status = {}
        for number, held in self._held.items():
            partition, counters = held.partition, held.partition.counters
            lag = lags.get(number, 0)
            status[number] = {
                "offset": held.saved_offset,
                "end": self._source.position(number) + lag,
                "lag": lag,
                "watermark": _iso(partition.watermark_us),
                "processed": counters.processed - counters.dead - counters.late,
                "dead": counters.dead,
                "late": counters.late,
                "keys": counters.keys,
                "read": counters.processed - held.restored,
                "seconds": self._ended_s - self._started_s,
                "epoch": self.epoch,
                "pid": os.getpid(),
                "heartbeat": heartbeat,
            }
        self._status = status

    def _about(self, number: int) -> dict[str, object]:
        return {"view": self.plan.view, "topic": self.plan.topic, "partition": number, "epoch": self.epoch}


def stream_name(plan: Plan) -> str:
    """Name of a plan's checkpoints: a view that is computed differently starts anew from the topic."""
    return f"{plan.view}-{plan.fingerprint[:12]}"


def check_keys(plan: Plan, batch: RecordBatch) -> None:
    """Make sure that readable records are keyed by their entity, without which partitions would share entities.

    Raises:
        WorkerError: one is not.
    """
    for row in range(min(len(batch.offsets), KEYS_CHECKED)):
        try:
            event = orjson.loads(batch.value(row) or b"")
        except orjson.JSONDecodeError:
            continue
        entity = event.get(plan.entity) if isinstance(event, dict) else None
        if not isinstance(entity, str | int) or isinstance(entity, bool):
            continue
        accepted = [str(entity).encode()]
        if isinstance(entity, int) and -(1 << 63) <= entity < 1 << 63:
            accepted.append(entity.to_bytes(8, "big", signed=True))
        key = batch.key(row)
        if key not in accepted:
            raise WorkerError(
                f"Topic {plan.topic!r} has several partitions but record {batch.offsets[row]} of partition"
                f" {batch.partition} has the key {key!r} and the {plan.entity} {entity!r}: produce it keyed by"
                f" {plan.entity}, or to a topic with one partition."
            )


def _iso(time_us: int) -> str | None:
    """ISO 8601 UTC; None for a clock that no event has set."""
    try:
        return datetime.fromtimestamp(time_us / 1e6, UTC).isoformat()
    except (OverflowError, ValueError, OSError):
        return None
