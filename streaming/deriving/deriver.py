"""A derivation over some partitions of its inputs: poll, derive, commit; with the face of a `worker.Worker`.

Ten times a second, what was derived of a partition since its last commit, and the state that the operator then has,
become a commit that a thread writes while the loop goes on (`commits`). Records and input offsets become visible
together, so a crash anywhere loses nothing and repeats nothing for who reads what is committed.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any, NamedTuple, Protocol

from kafka.errors import KafkaError

from streaming import loop
from streaming.allowance import Allowance
from streaming.changes import check_declared
from streaming.checkpoint import CheckpointStore, StaleEpochError
from streaming.derived import Operator
from streaming.deriving.alignment import Alignment, Foreign
from streaming.deriving.commits import Commits, Output
from streaming.deriving.derivation import Derivation
from streaming.deriving.derived_partition import DerivedPartition, Waiting
from streaming.deriving.transactions import Progress
from streaming.holding import Rejects, Source
from streaming.keyed import KeyCheck
from streaming.loop import FINISH_S
from streaming.metrics import Measures
from streaming.silence import Silence
from streaming.state import StateError
from streaming.windows import NEVER_US

log = logging.getLogger(__name__)

POLL_S = 0.02
RECORDS_A_BATCH = 16_384
STATUS_S = 0.5
PENDING_ROWS = 200_000
THREADS = 8


class Reading(Source, Foreign, Protocol):
    """What deriving needs of a consumer (`consumer.Consumer`)."""

    def hold(self, partitions: Iterable[int]) -> None: ...  # noqa: D102


class _Keyed(NamedTuple):
    topic: str
    entity: str


class Deriver:
    """Computes one derivation.

    Args:
        derivation: what to compute.
        sources: where the records of each side come from.
        rejects: where those that each side's were refused go.
        checkpoints: where state goes.
        operator: makes the operator of a partition, from its snapshot and deltas where there are some.
        output: makes what writes what comes of a partition.
        ticking: let the clock of idle inputs advance while brokers answer; off for a run that ends when caught up.
        keyed: refuse records of a join whose key is not what they are joined on (where topics have several partitions).
        shared: another worker may take a partition over, which is then let go; otherwise that is an error.
        allowance: memory that the operators of all partitions may take, with the states of other workers of the
            process; more is an error.
        executor: runs commits; threads by default.
        wall_us: wall clock in UTC microseconds.
        monotonic_s: clock for intervals.
    """

    def __init__(
        self,
        derivation: Derivation,
        *,
        sources: Sequence[Reading],
        rejects: Sequence[Rejects],
        checkpoints: CheckpointStore,
        operator: Callable[[int, Sequence[bytes]], Operator],
        output: Callable[[int], Output],
        ticking: bool = True,
        keyed: bool = False,
        shared: bool = False,
        allowance: Allowance | None = None,
        executor: Executor | None = None,
        wall_us: Callable[[], int] = lambda: time.time_ns() // 1_000,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan = derivation
        self.measures = Measures()
        self._sources, self._rejects, self._checkpoints = sources, rejects, checkpoints
        self._operator, self._output = operator, output
        self._ticking, self._keyed, self._shared = ticking, keyed, shared
        self._allowance = allowance
        self._executor = executor or ThreadPoolExecutor(THREADS, thread_name_prefix="commits")
        self._wall_us, self._monotonic_s = wall_us, monotonic_s
        self._held: dict[int, DerivedPartition] = {}
        self._wanted: tuple[dict[int, int], bool] | None = None
        self._alignment: Alignment | None = None
        self._on_hold: list[set[int]] = [set() for _ in sources]
        self._checks: list[KeyCheck] | None = None
        self._next_status_s = self._started_s = self._ended_s = 0.0
        self._status: dict[int, dict[str, Any]] = {}

    def start(self, partitions: Mapping[int, int]) -> None:
        """Take partitions over (number to epoch): fence, restore, seek.

        Raises:
            StaleEpochError: a newer worker has them.
            StateError: they were written by another declaration, or their state is gone.
            CheckpointError: no checkpoint can be read.
            OffsetError: a topic was made again.
        """
        self._started_s = self._ended_s = self._monotonic_s()
        self._reassign(partitions)

    def assign(self, partitions: Mapping[int, int], discard: bool = False) -> None:
        """Let the next step change to these partitions, as `Worker.assign` does; safe from another thread."""
        self._wanted = dict(partitions), discard

    def holds(self) -> set[int]:
        """The partitions that this worker has; safe to call from another thread."""
        return set(self._held.copy())

    def step(self, timeout_s: float = POLL_S) -> int:
        """Poll once, derive what came, begin the commits that are due; returns the number of records read.

        Polls nothing while more waits to be committed than memory should hold.

        Raises:
            KafkaError, OSError: something is away; nothing is lost, step again later.
            StaleEpochError: a newer worker has taken a partition over.
            StateError: an operator holds more than it may.
            WorkerError: records are not keyed by what they are joined on.
        """
        if self._wanted is not None:
            wanted = self._wanted
            self._reassign(*wanted)
            if self._wanted is wanted:  # else it was changed meanwhile
                self._wanted = None
        self._collect()
        read = 0
        if sum(held.pending for held in self._held.values()) <= PENDING_ROWS:
            read = self._poll(timeout_s)
        elif timeout_s:
            wait_for([held.running for held in self._held.values() if held.running], timeout_s)
        self._derive()
        if self._ticking:
            self._tick()
        self._hold_back()
        now_s = self._monotonic_s()
        for held in self._held.values():
            if held.due(now_s):
                self._begin(held)
        if now_s >= self._next_status_s:
            self._refresh_status()
        return read

    def checkpoint(self) -> None:
        """Commit everything that was derived, and wait for it.

        Raises:
            KafkaError, OSError: something is away; nothing is lost, call again later.
            StaleEpochError: a newer worker has taken a partition over.
        """
        deadline_s = self._monotonic_s() + FINISH_S
        self._collect()
        while busy := [held for held in self._held.values() if held.moved or held.commit]:
            for held in busy:
                self._begin(held)
            running = [held.running for held in busy if held.running]
            if not running:
                raise KafkaError("commits have failed and wait to be tried again")
            if not wait_for(running, max(0.0, deadline_s - self._monotonic_s())).done:
                raise KafkaError(f"a commit has not ended in {FINISH_S:.0f} s")
            self._collect()

    def caught_up(self) -> bool:
        """Whether every record that the broker has now was processed; asks the broker.

        Raises:
            KafkaError: the broker did not answer.
        """
        return not any(held.waiting for held in self._held.values()) and all(
            source.position(number) >= end for source in self._sources for number, end in source.end_offsets().items()
        )

    def run(self, stop: threading.Event, until_caught_up: bool) -> None:
        """Step until told to stop, or until there is nothing left to read and what waits is drained; then commit."""
        loop.run(
            self.plan.view,
            stop,
            step=self.step,
            ended=lambda: until_caught_up and self.caught_up() and self._drained(),
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
        for held in self._held.values():
            held.commits.close()
        for rejects in self._rejects:
            rejects.close()
        for source in self._sources:
            source.close()

    def _reassign(self, wanted: Mapping[int, int], discard: bool = False) -> None:
        """Let the partitions go that are not wanted, and take those that are new."""
        if self._keyed or any(number > 0 for number in wanted):  # there are several partitions
            if len(self._sources) > 1 and self._checks is None:
                self._checks = [KeyCheck(_Keyed(each.topic, self.plan.on)) for each in self.plan.inputs]
            if self.plan.drift_us and self._alignment is None:
                self._alignment = Alignment(self.plan, self._sources[0], self._monotonic_s)
        leaving = self._held.keys() - wanted.keys()
        if leaving:
            if not discard:
                self.checkpoint()
            self._let_go(leaving)
        coming = [number for number in wanted if number not in self._held]
        for source in self._sources:
            source.assign([*self._held, *coming])
        for number in coming:
            self._take(number, wanted[number])
        self._refresh_status()

    def _take(self, number: int, epoch: int) -> None:
        check_declared(self._checkpoints, self.plan, [number])
        epoch = epoch or 1 + self._checkpoints.epoch(self.plan.name, number)
        commits = Commits(self.plan, number, output=self._output(number), checkpoints=self._checkpoints)
        try:
            found, states = commits.take(epoch)
            operator = self._operator(number, states)
            if found is not None and states:
                commits.keep(found, operator.snapshot())
            offsets = found.offsets if found else [None] * len(self._sources)
            starts = [source.seek(number, at) for source, at in zip(self._sources, offsets, strict=True)]
        except BaseException:
            commits.close()
            raise
        now_s, now_us = self._monotonic_s(), self._wall_us()
        self._held[number] = DerivedPartition(
            self.plan,
            operator,
            commits,
            found or Progress(0, tuple(starts), self.plan.fingerprint),
            starts,
            began_s=now_s,
            heard_s=[now_s] * len(self._sources),
            silences=[Silence(now_s, now_us, source.unanswered_s()[number]) for source in self._sources],
            saved_s=now_s,
        )
        log.info("partition taken", extra=self._about(number) | {"offsets": starts, "restored": found is not None})

    def _let_go(self, numbers: Iterable[int]) -> None:
        for number in self._held.keys() & set(numbers):
            log.info("partition let go", extra=self._about(number))
            self._held.pop(number).commits.close()
            if self._allowance is not None:
                self._allowance.free((self.plan.name, number))
        for source in self._sources:
            source.assign(self._held)

    def _poll(self, timeout_s: float) -> int:
        """Read from every side those partitions of which nothing waits; the last one waits, if nothing is there."""
        read = 0
        for side, source in enumerate(self._sources):
            last = side == len(self._sources) - 1 and not read
            for batch in source.poll(timeout_s if last else 0.0, RECORDS_A_BATCH):
                if self._checks is not None:
                    self._checks[side].look(batch)
                times_us = None
                if self._alignment is not None and side == 0:
                    times_us = self._alignment.times_us(batch, self._wall_us())
                self._held[batch.partition].waiting.append(Waiting(side, batch, times_us))
                read += len(batch.offsets)
        return read

    def _derive(self) -> None:
        """Process what was read, of each partition as far as it may run ahead of the others."""
        limits: dict[int, int] = {}
        if self._alignment is not None:
            lag = self._sources[0].lag()
            standings = {number: held.standing(lag.get(number, 0)) for number, held in self._held.items()}
            known = {number: standing for number, standing in standings.items() if standing is not None}
            limits = self._alignment.limits_us(known, [number for number, held in self._held.items() if held.waiting])
            if not self._alignment.alone:
                self._announce()
        now_s, now_us = self._leave_out([number for number, held in self._held.items() if held.waiting])
        for number, held in self._held.items():
            for batch in held.derive(limits.get(number, NEVER_US), now_us, now_s):
                self.measures.read(batch)
            self._check_size(number, held)

    def _announce(self) -> None:
        """Let workers of other partitions see how far these are, also where nothing was derived of them."""
        for number, held in self._held.items():
            if not held.waiting:  # the end of a transaction lies between the last record and the position
                held.offsets[0] = max(held.offsets[0], self._sources[0].position(number))
            if held.next_us > held.progress.clock_us or held.offsets[0] > held.progress.offsets[0]:
                held.moved = True

    def _check_size(self, number: int, held: DerivedPartition) -> None:
        if self._allowance is None:
            return
        holder, needed = (self.plan.name, number), held.operator.buffered_bytes
        if not self._allowance.grant(holder, needed):
            raise StateError(
                f"Partition {number} of the derived topic {self.plan.name!r} holds {needed >> 20} MiB of events that"
                f" wait for others; {self._allowance.limits(holder)}."
            )

    def _tick(self) -> None:
        """Let the clocks of inputs advance that were read to their end and have been idle for a while."""
        now_s = self._monotonic_s()
        quiet = [(number, held) for number, held in self._held.items() if held.quiet(now_s)]
        if not quiet:
            return
        lags = [source.lag() for source in self._sources]
        now_s, now_us = self._leave_out([number for number, _ in quiet])
        for number, held in quiet:
            held.tick([lag.get(number, 0) for lag in lags], now_s, now_us)

    def _leave_out(self, numbers: Sequence[int]) -> tuple[float, int]:
        """Let no time count for these partitions that was no silence of their entities; returns both clocks."""
        now_s, now_us = self._monotonic_s(), self._wall_us()
        unanswered_s = [source.unanswered_s() for source in self._sources] if numbers else []
        for number in numbers:
            self._held[number].leave_out([each[number] for each in unanswered_s], now_s, now_us)
        return now_s, now_us

    def _drained(self) -> bool:
        """Takes what waits in the operators, because nothing more will come."""
        for held in self._held.values():
            if not held.drained:
                held.drained = True
                held.take(held.operator.drain())
        return True

    def _hold_back(self) -> None:
        """Read nothing of a partition of which much waits, nor of a side that is ahead of one that has more to read."""
        lags = [source.lag() for source in self._sources]
        for side, source in enumerate(self._sources):
            ahead = {
                number
                for number, held in self._held.items()
                if held.is_ahead(side, [lag.get(number, 0) for lag in lags])
            }
            if ahead != self._on_hold[side]:
                source.hold(ahead)
                self._on_hold[side] = ahead

    def _begin(self, held: DerivedPartition) -> None:
        """Write the rejects and hand the rest to a thread, unless a commit is under way."""
        if held.commit is not None:
            return
        for side, rejects in enumerate(self._rejects):
            rejects.write([reject for at, reject in held.rejects if at == side])
        held.rejects = []
        held.running = self._executor.submit(held.commits.save, held.begin(self._monotonic_s))

    def _collect(self) -> None:
        """See which commits have ended; those that failed are tried again after a pause."""
        now_s = self._monotonic_s()
        lost = set()
        for number, held in self._held.items():
            if held.commit is None:
                continue
            if held.running is None and now_s >= held.retry_s:
                held.running = self._executor.submit(held.commits.save, held.commit)
            try:
                if held.collect(now_s):
                    self._ended_s = now_s
                    self.measures.flushed(now_s - held.began_s, self._wall_us())
            except StaleEpochError as error:
                if not self._shared:
                    raise
                log.warning("partition lost", extra=self._about(number) | {"error": str(error)})
                lost.add(number)
        if lost:
            self._let_go(lost)

    def _refresh_status(self) -> None:
        now_s, now_us = self._monotonic_s(), self._wall_us()
        self._next_status_s = now_s + STATUS_S
        lags = [source.lag() for source in self._sources]
        seconds = self._ended_s - self._started_s
        status = {}
        for number, held in self._held.items():
            lag = sum(each.get(number, 0) for each in lags)
            end = sum(source.position(number) for source in self._sources) + lag
            lost = sum(source.lost.get(number, 0) for source in self._sources)
            status[number] = held.figures(lag, end, lost, now_us, now_s) | {"seconds": seconds}
        self._status = status

    def _about(self, number: int) -> dict[str, object]:
        held = self._held.get(number)
        return {"view": self.plan.view, "partition": number, "epoch": held and held.commits.epoch}
