"""One view over some partitions: poll, process, emit, write, checkpoint.

The order of every flush is what makes a crash at any point harmless. Rejects first and what models detected (idempotent
by partition and offset), then the online store (keeps the newer event time), then the offline part (named by its
offsets, removed when it goes beyond the checkpoint), then the checkpoint (state and offset in one file), then the
commit (advisory). What a crash loses is computed again from the checkpoint by the same kernel over the same records, so
it ends the same.
The loop writes all before the offline part; it captures the state as bytes about once a second, after a flush, and a
thread writes the offline part and the checkpoint from these while the loop goes on (`saving.Saver`).
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from streaming import loop
from streaming.allowance import Allowance
from streaming.cadence import Cadence
from streaming.changes import check_declared
from streaming.checkpoint import CheckpointStore
from streaming.holding import Drifts, Held, Offline, Online, Rejects, Source
from streaming.keyed import KeyCheck
from streaming.loop import BACKOFF_S, FINISH_S
from streaming.metrics import Measures
from streaming.partition import Partition
from streaming.plan import Plan
from streaming.poison import SpoiledError, feed, poisonous, without
from streaming.records import Drift, Emission, RecordBatch, Reject
from streaming.saving import Captured, Saved, Saver, SavingError
from streaming.silence import Silence

log = logging.getLogger(__name__)

POLL_S = 0.02
RECORDS_A_BATCH = 32_768
FLUSH_S = 0.05
IDLE_S = 1.0
STATUS_S = 0.5
PENDING_ROWS = 250_000
PENDING_REJECTS = 10_000
BEGINNING_US = -(1 << 63)


class Worker:
    """Computes one view over some partitions of its topic.

    Args:
        plan: what to compute.
        source: where records come from.
        online: where the newest row of each entity goes.
        offline: where every row goes.
        rejects: where refused records go.
        checkpoints: where state goes.
        drifts: where detections of drift are published.
        ticking: let the clock of idle partitions advance while brokers answer; off for a run that ends when caught up,
            so that its outcome depends on the records only.
        keyed: refuse records whose key is not the entity (needed where the topic has several partitions).
        shared: another worker may take a partition over, which is then let go; otherwise that is an error.
        flush_s: pause between writes to the online store while the worker keeps up.
        allowance: memory that the states of all partitions may take, of other workers of the process too; more ends the
            worker with a sentence.
        executor: runs the slow half of checkpoints, a job at a time; a thread by default.
        wall_us: wall clock in UTC microseconds.
        monotonic_s: clock for intervals.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        source: Source,
        online: Online,
        offline: Offline,
        rejects: Rejects,
        checkpoints: CheckpointStore,
        drifts: Drifts | None = None,
        ticking: bool = True,
        keyed: bool = False,
        shared: bool = False,
        flush_s: float = FLUSH_S,
        allowance: Allowance | None = None,
        executor: Executor | None = None,
        wall_us: Callable[[], int] = lambda: time.time_ns() // 1_000,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan = plan
        self.measures = Measures()
        self._source, self._online, self._offline = source, online, offline
        self._rejects, self._drifts, self._checkpoints = rejects, drifts, checkpoints
        self._ticking, self._shared = ticking, shared
        self._keys = KeyCheck(plan) if keyed else None
        self._allowance = allowance
        self._wall_us, self._monotonic_s = wall_us, monotonic_s
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._saver = Saver(
            plan.view,
            online=online,
            offline=offline,
            checkpoints=checkpoints,
            executor=self._executor,
            monotonic_s=monotonic_s,
        )
        self._cadence = Cadence(flush_s, monotonic_s())
        self._held: dict[int, Held] = {}
        self._wanted: tuple[dict[int, int], bool] | None = None
        self._spoiled: dict[int, int] = {}
        self._unflushed: list[Emission] = []
        self._refused: list[Reject] = []
        self._drifted: list[Drift] = []
        self._new_rows = self._captured_rows = 0
        self._next_status_s = self._next_save_s = 0.0
        self._save_pause_s = BACKOFF_S[0]
        self._started_s = self._ended_s = 0.0
        self._status: dict[int, dict[str, Any]] = {}

    def start(self, partitions: Mapping[int, int]) -> None:
        """Take partitions over (number to epoch): claim, restore, remove offline parts beyond the checkpoint, seek.

        Raises:
            StaleEpochError: a newer worker has them.
            OffsetError: the topic was made again since the checkpoint.
            StateError: a checkpoint that does not fit the plan.
            CheckpointError: no checkpoint can be read.
        """
        self._started_s = self._ended_s = self._monotonic_s()
        self._reassign(partitions)

    def assign(self, partitions: Mapping[int, int], discard: bool = False) -> None:
        """Let the next step change to these partitions; safe from another thread.

        Each number comes with the epoch of this owner, 0 for the next that nobody has had. Those that leave are flushed
        and checkpointed first, or discarded where somebody else has them already; those that come are taken over as by
        `start`.
        """
        self._wanted = dict(partitions), discard

    def holds(self) -> set[int]:
        """The partitions that this worker has; safe to call from another thread."""
        return set(self._held.copy())

    def step(self, timeout_s: float = POLL_S) -> int:
        """Poll once, process what came, write what is due; returns the number of records read.

        Polls nothing while more rows wait for a checkpoint than memory should hold.

        Raises:
            KafkaError, sqlite3.OperationalError, OSError: something is away; nothing is lost, step again later.
            StaleEpochError: a newer worker has taken a partition over.
            WorkerError: records are not keyed by the entity.
        """
        if self._wanted is not None:
            wanted = self._wanted
            self._reassign(*wanted)
            if self._wanted is wanted:  # else it was changed meanwhile
                self._wanted = None
        self._rewind()
        now_s = self._monotonic_s()
        full = self._new_rows + self._captured_rows > PENDING_ROWS or len(self._refused) > PENDING_REJECTS
        batches: list[RecordBatch] = []
        if not full:
            if self._flushable():
                timeout_s = min(timeout_s, max(0.0, self._cadence.flush_in_s(now_s, 0)))
            batches = self._source.poll(timeout_s, RECORDS_A_BATCH)
        now_us = self._leave_out({batch.partition for batch in batches}) if batches else 0
        for batch in batches:
            if batch.partition not in self._spoiled:  # else it is read again from the checkpoint
                self._process(batch, now_us)
        self._rewind()
        if self._ticking:
            self._tick()
        crowded = full or self._new_rows > PENDING_ROWS // 2
        now_s = self._monotonic_s()
        if self._flushable() and (crowded or self._cadence.flush_in_s(now_s, sum(self._source.lag().values())) <= 0):
            self.flush()
        if (crowded or self._cadence.checkpoint_due(now_s)) and not self._saver.busy and not self._flushable():
            self._capture()
        if now_s >= self._next_status_s:
            self._refresh_status()
        if self._saver.busy and now_s >= self._next_save_s:
            self._collect_saved(timeout_s if full else 0.0)
        return sum(len(batch.offsets) for batch in batches)

    def flush(self) -> None:
        """Write rejects, drifts and the newest online values; what fails is kept for the next try."""
        began_s = self._monotonic_s()
        self._rejects.write(self._refused)
        self._refused = []
        if self._drifts is not None:
            self._drifts.write(self._drifted)
        self._drifted = []
        for held in self._held.values():
            if held.dirty:
                held.dirty = False
                self._keep(held, held.partition.emit())
        if self._unflushed:
            self._online.write(self._unflushed)
            self._unflushed = []
        ended_s = self._monotonic_s()
        self._cadence.flushed(began_s, ended_s)
        self.measures.flushed(ended_s - began_s, self._wall_us())

    def checkpoint(self) -> None:
        """Flush, then write offline parts, state and offset of every partition that moved, and wait for all of it.

        Raises:
            KafkaError, sqlite3.OperationalError, OSError: something is away; nothing is lost, call again later.
            StaleEpochError: a newer worker has taken a partition over.
        """
        self._rewind()
        self.flush()
        self._drain()
        self._capture()
        self._drain()

    def caught_up(self) -> bool:
        """Whether every record that the broker has now was processed; asks the broker.

        Raises:
            KafkaError: the broker did not answer.
        """
        return all(self._source.position(number) >= end for number, end in self._source.end_offsets().items())

    def run(self, stop: threading.Event, until_caught_up: bool) -> None:
        """Step until told to stop, or until there is nothing left to read; then checkpoint."""
        loop.run(
            self.plan.view,
            stop,
            step=self.step,
            ended=lambda: until_caught_up and self.caught_up(),
            checkpoint=self.checkpoint,
            refresh_status=self._refresh_status,
            monotonic_s=self._monotonic_s,
        )

    def status(self) -> dict[int, dict[str, Any]]:
        """Partition to its figures, at most a second old; safe to call from another thread."""
        return self._status

    def close(self) -> None:
        """Leave the broker."""
        self._executor.shutdown(wait=False)
        self._rejects.close()
        if self._drifts is not None:
            self._drifts.close()
        self._source.close()

    def _reassign(self, wanted: Mapping[int, int], discard: bool = False) -> None:
        """Let the partitions go that are not wanted, and take those that are new."""
        if any(number > 0 for number in wanted):
            self._keys = self._keys or KeyCheck(self.plan)  # also of a topic that had one partition when this began
        leaving = self._held.keys() - wanted.keys()
        if leaving:
            if not discard:
                self.checkpoint()
            self._let_go(leaving)
        coming = [number for number in wanted if number not in self._held]
        self._source.assign([*self._held, *coming])
        for number in coming:
            self._take(number, wanted[number])
        self._refresh_status()

    def _take(self, number: int, epoch: int) -> None:
        check_declared(self._checkpoints, self.plan, [number])
        epoch = epoch or 1 + self._checkpoints.epoch(self.plan.view, number)
        self._checkpoints.claim(self.plan.view, number, epoch, self.plan.essence)
        partition, offset, restored = self._restore(number)
        now_s = self._monotonic_s()
        processed = partition.counters.processed
        silence = Silence(now_s, self._wall_us(), self._source.unanswered_s()[number])
        self._held[number] = Held(partition, epoch, offset, offset, now_s, processed, silence, last_record_s=now_s)
        log.info("partition taken", extra=self._about(number) | {"offset": offset, "restored": restored})

    def _restore(self, number: int) -> tuple[Partition, int, bool]:
        """The partition as it was saved, the offset at which it goes on, and whether there was a checkpoint."""
        saved = self._checkpoints.load(self.plan.view, number)
        offset = self._source.seek(number, saved.offset if saved else None)
        if saved is None:
            aside = f"before-{self._checkpoints.epoch(self.plan.view, number):010d}"
            self._offline.truncate(number, offset, BEGINNING_US, aside)
            return Partition(self.plan, number, self._allowance), offset, False
        partition = Partition.restore(self.plan, number, saved.state, *saved.deltas, allowance=self._allowance)
        self._offline.truncate(number, saved.offset, saved.clock_us)
        return partition, saved.offset, True

    def _let_go(self, numbers: Iterable[int]) -> None:
        for number in self._held.keys() & set(numbers):
            log.info("partition let go", extra=self._about(number))
            del self._held[number]
            self._spoiled.pop(number, None)
            if self._allowance is not None:
                self._allowance.free((self.plan.view, number))
        self._source.assign(self._held)
        self._count_rows()

    def _flushable(self) -> bool:
        return bool(self._unflushed or self._refused) or any(held.dirty for held in self._held.values())

    def _process(self, batch: RecordBatch, now_us: int) -> None:
        if self._keys is not None:
            self._keys.look(batch)
        held = self._held[batch.partition]
        last, marked = int(batch.offsets[-1]), False
        try:
            for refused in self._pieces(held, batch, now_us):
                self._refused.extend(refused)
                self._detected(held)
                held.dirty = True
                if held.partition.next_offset <= last:  # the rest of the batch lies in another pane
                    held.partition.mark()
                    marked = True
        except SpoiledError as error:
            if held.suspect_until >= last:
                raise
            log.error("going back to the last checkpoint", extra=self._about(batch.partition) | {"error": str(error)})
            self._spoiled[batch.partition], held.dirty = last, False
            return
        if marked:
            self._keep(held, held.partition.take())
        held.last_record_s = self._monotonic_s()
        self._cadence.read(len(batch.offsets))
        self.measures.read(batch)

    def _detected(self, held: Held) -> None:
        for drift in held.partition.drifts:
            log.warning("drift detected", extra=self._about(drift.partition) | drift._asdict())
            self._drifted.append(drift)

    def _pieces(self, held: Held, batch: RecordBatch, now_us: int) -> Iterator[list[Reject]]:
        if int(batch.offsets[0]) > held.suspect_until:
            return feed(held.partition, batch, now_us)
        held.unchained = True
        return without(held.partition, batch, now_us, poisonous(held.partition, batch, now_us))

    def _rewind(self) -> None:
        """Restore spoiled partitions; up to the failing batch's end, their records are then tried on copies first."""
        if not self._spoiled:
            return
        self._drain()
        for number, last in list(self._spoiled.items()):
            held = self._held[number]
            held.partition, held.captured_offset, _ = self._restore(number)
            held.saved_offset, held.rows, held.dirty, held.suspect_until = held.captured_offset, [], True, last
            del self._spoiled[number]
        self._count_rows()

    def _tick(self) -> None:
        """Let the clock of partitions advance that were read to their end and have been idle for a while."""
        now_s = self._monotonic_s()
        idle = [held for held in self._held.values() if now_s - self._idle_since_s(held) >= IDLE_S]
        if not idle:
            return
        lags, now_us = self._source.lag(), self._leave_out(held.partition.partition for held in idle)
        for held in idle:
            if lags[held.partition.partition] == 0:
                held.partition.tick(now_us)
                held.dirty = True
            held.ticked_s = now_s

    def _leave_out(self, numbers: Iterable[int]) -> int:
        """Let no time count for these partitions that was no silence of their entities; returns the wall clock."""
        now_s, now_us, unanswered_s = self._monotonic_s(), self._wall_us(), self._source.unanswered_s()
        for number in numbers:
            held = self._held[number]
            if left_out_us := sum(held.silence.left_out_us(now_s, now_us, unanswered_s[number])):
                held.partition.leave_out(left_out_us)
                held.shifted = True
        return now_us

    def _idle_since_s(self, held: Held) -> float:
        """Where entities have clocks of their own, some are idle also while others have events."""
        return held.ticked_s if self.plan.clocks == "key" else max(held.ticked_s, held.last_record_s)

    def _keep(self, held: Held, emission: Emission) -> None:
        if len(emission.entities):
            self._unflushed.append(emission)
            held.rows.append((emission, self._wall_us()))
            self._new_rows += len(emission.entities)

    def _capture(self) -> None:
        """Begin a checkpoint of every partition that moved; everything in it must have been flushed."""
        began_s = self._monotonic_s()
        captured = []
        for number, held in self._held.items():
            partition = held.partition
            if not held.rows and not held.shifted and partition.next_offset <= held.captured_offset:
                held.saved_s = began_s
                continue
            whole = held.unchained or self._checkpoints.wants_whole(self.plan.view, number)
            state = partition.snapshot() if whole else partition.delta()
            offsets = (held.captured_offset, partition.next_offset)
            captured.append(Captured(number, held.epoch, *offsets, partition.clock_us, held.rows, state, not whole))
            held.rows, held.captured_offset, held.unchained, held.shifted = [], partition.next_offset, False, False
            held.checkpoint_bytes = len(state)
        self._cadence.captured(began_s, self._monotonic_s())
        self._captured_rows, self._new_rows = self._new_rows, 0
        if captured:
            self._saver.begin(captured)

    def _collect_saved(self, wait_s: float) -> None:
        """See whether the slow half of a checkpoint has ended; commit what it saved.

        Raises:
            SavingError: it failed.
            StaleEpochError: a newer worker has taken a partition over, which none may but another job.
        """
        try:
            saved = self._saver.collect(wait_s)
        except Exception as error:
            self._next_save_s = self._monotonic_s() + self._save_pause_s
            self._save_pause_s = min(2 * self._save_pause_s, BACKOFF_S[1])
            if isinstance(error, OSError):
                raise SavingError(f"The checkpoint of view {self.plan.view!r} cannot be written: {error}") from error
            raise
        if saved is not None:
            self._saved(saved)

    def _saved(self, saved: Saved) -> None:
        self._captured_rows = 0
        self._save_pause_s = BACKOFF_S[0]
        self._ended_s = self._monotonic_s()
        self.measures.saved(saved.seconds)
        for number, offset in saved.offsets.items():
            if held := self._held.get(number):
                held.saved_offset, held.saved_s = offset, self._ended_s
        self._source.commit(saved.offsets)
        for number, error in saved.lost.items():
            if not self._shared:
                raise error
            log.warning("partition lost", extra=self._about(number) | {"error": str(error)})
        if saved.lost:
            self._let_go(saved.lost)

    def _drain(self) -> None:
        """Wait until the slow half of the checkpoint under way, if any, has ended."""
        while self._saver.busy:
            self._collect_saved(FINISH_S)

    def _count_rows(self) -> None:
        self._new_rows = sum(len(emission.entities) for held in self._held.values() for emission, _ in held.rows)

    def _refresh_status(self) -> None:
        now_s, now_us = self._monotonic_s(), self._wall_us()
        self._next_status_s = now_s + STATUS_S
        lags, lost, seconds = self._source.lag(), self._source.lost, self._ended_s - self._started_s
        self._status = {
            number: held.figures(self._source.position(number), lags.get(number, 0), lost.get(number, 0), now_us, now_s)
            | {"seconds": seconds}
            for number, held in self._held.items()
        }
        if self._allowance is not None:
            for number, row in self._status.items():
                self._allowance.shrink((self.plan.view, number), row["state_bytes"])

    def _about(self, number: int) -> dict[str, object]:
        held = self._held.get(number)
        return {"view": self.plan.view, "topic": self.plan.topic, "partition": number, "epoch": held and held.epoch}
