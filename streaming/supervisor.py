"""Spreads the partitions of all views over worker actors, starts killed ones again, and tells how it goes.

A restarted worker gets a newer epoch, so the one that it replaces can write nothing more should it still live.
Under the home's `stream` folder each job has files of its own (`report`): how its partitions are, every second, where
its workers serve their metrics, for Prometheus' file_sd_configs, and how many there should be; who writes another
number there changes it while the stream runs. A partition that moves is let go by its worker, which flushes and
checkpoints it, before another one takes it.

Derived topics are computed beside the views that read them; where a run ends when it is caught up, before them, since a
view that has read all that is there cannot know what is still to come.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from feast import FeatureStore
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from streaming.actor import Assignment, StreamActor
from streaming.changes import check_declared
from streaming.checkpoint import CheckpointStore, StaleEpochError, check_uri
from streaming.deriving.derivation import Derivation
from streaming.deriving.topology import Growth, SupervisorError, input_topics, prepare, stages
from streaming.opening import Settings, checkpoint_uri
from streaming.plan import Plan
from streaming.report import Report, beating
from streaming.shares import Unit, deal
from streaming.topics import TopicWatch
from streaming.worker import FLUSH_S

log = logging.getLogger(__name__)

WAIT_S = 0.25
STATUS_S = 1.0
BACKOFF_S = (0.2, 10.0)
SILENCE_S = 120.0
HEALTHY_S = 60.0
FAILURES = 5


@dataclass
class _Member:
    """One worker actor and its history."""

    told: dict[Unit, int] = field(default_factory=dict)
    leaving: set[Unit] = field(default_factory=set)
    actor: Any = None
    running: Any = None
    asked: Any = None
    started_s: float = 0.0
    heard_s: float = 0.0
    restart_s: float = 0.0
    failures: int = 0
    status: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    surplus: bool = False
    done: bool = False

    def shows(self, unit: Unit) -> bool:
        """Whether its worker still had the partition when it was last heard."""
        return self.running is not None and unit.partition in self.status.get(unit.view, {})


class Supervisor:
    """Runs views on worker actors until stopped or caught up.

    Args:
        store: the Feast store of the views.
        plans: what to compute; derivations before what reads them.
        home: folder under which the files of `Report` are kept.
        checkpoints: absolute path or URI of the folder where checkpoints are kept; default: one under the home.
        reset: views and derivations whose checkpoints are set aside first, so that they start from the earliest offset.
        workers: how many actors share the partitions; not more are started than there are partitions.
        until_caught_up: end when every record that is there has been processed and checkpointed; the number of workers
            stays as it is.
        flush_s: pause between writes to the online store of workers that keep up.
        max_state_bytes: memory that the states of a worker may take together; more ends the stream with a sentence.
        by_group: let a Kafka consumer group deal the partitions.
    """

    def __init__(
        self,
        store: FeatureStore,
        plans: Sequence[Plan | Derivation],
        *,
        home: Path,
        checkpoints: str | None = None,
        reset: Sequence[str] = (),
        workers: int = 1,
        until_caught_up: bool = False,
        flush_s: float = FLUSH_S,
        max_state_bytes: int | None = None,
        by_group: bool = False,
    ) -> None:
        if not plans:
            raise SupervisorError("There is no stream feature view to compute: declare one and run `feast apply`.")
        if workers < 1:
            raise SupervisorError(f"A stream needs at least one worker, not {workers}.")
        if by_group and until_caught_up:
            raise SupervisorError(
                "A consumer group cannot run until caught up, because partitions come and go: leave the assignment to"
                " the supervisor."
            )
        self._plans = {plan.view: plan for plan in plans}
        if unknown := [name for name in reset if name not in self._plans]:
            raise SupervisorError(
                f"There is no '{unknown[0]}' to reset: this stream computes {', '.join(sorted(self._plans))}."
            )
        self._reset = dict.fromkeys(reset)
        self._stage: dict[str, Plan | Derivation] = {}
        self._store, self._home, self._workers = store, home.absolute(), workers
        uri = check_uri(checkpoints or checkpoint_uri(self._home))
        self._settings = Settings(str(self._home), uri, flush_s, until_caught_up, by_group, max_state_bytes)
        self._checkpoints = CheckpointStore(uri)
        self._report = Report(self._home / "stream", self._plans)
        self._counts: dict[str, int] = {}
        self._members: dict[int, _Member] = {}
        self._ended_statuses: list[dict[str, dict[int, dict[str, Any]]]] = []
        self._target: dict[int, set[Unit]] = {}
        self._stopping = False
        self._next_status_s = 0.0

    def run(self) -> dict[str, dict[str, float]]:
        """Work until done; returns for each view its counts and rate.

        `processed`, `dead` and `late` count all records up to the last checkpoint and add up to what was produced;
        `seconds` and `events_per_s` are of this run.

        Raises:
            SupervisorError: no broker, or something that trying again cannot help.
            StateError: checkpoints of another declaration; nothing was started.
        """
        plans = list(self._plans.values())
        for name in self._reset:
            log.warning("checkpoints set aside", extra={"view": name, "folders": self._checkpoints.reset(name)})
        for plan in plans:
            check_declared(self._checkpoints, plan, self._checkpoints.partitions(plan.view))
        self._report.begin(self._workers)
        try:
            self._counts = prepare(plans, lambda: self._stopping)
            for stage in stages(plans) if self._settings.until_caught_up else [plans]:
                if not self._stopping:
                    self._stage = {plan.view: plan for plan in stage}
                    self._compute()
        finally:
            self._report.end()
        return self._report.totals(self._plans, self._ended_statuses)

    def stop(self) -> None:
        """Let every worker flush and checkpoint, then `run` return; safe in a signal handler."""
        self._stopping = True

    def _compute(self) -> None:
        """Run a stage to its end."""
        topics = [(plan.bootstrap_servers, topic) for plan in self._stage.values() for topic in input_topics(plan)]
        watches = [
            TopicWatch(servers, [topic for at, topic in topics if at == servers])
            for servers in {servers for servers, _ in topics}
        ]
        self._target, self._members = {}, {}
        growth = Growth(list(self._stage.values()))
        self._scale()
        try:
            while not all(member.done for member in self._members.values()):
                self._watch(watches, growth)
        finally:
            for watch in watches:
                watch.close()
            for member in self._members.values():
                if member.actor is not None:
                    ray.kill(member.actor)
        self._ended_statuses += [member.status for member in self._members.values()]
        self._members = {}
        self._tell()

    def _scale(self) -> None:
        """Decide how many members there are and what each of them should have."""
        units = [Unit(plan.view, number) for plan in self._stage.values() for number in range(self._counts[plan.topic])]
        wanted = min(self._workers, len(units))
        active = [at for at, member in self._members.items() if not member.surplus]
        for at in active[wanted:]:
            self._members[at].surplus = True
        while len(active) < wanted:
            at = max(self._members, default=-1) + 1
            self._members[at] = _Member()
            active.append(at)
        if not self._settings.by_group:
            self._target = deal(units, {at: self._target.get(at, set()) for at in active[:wanted]})
        log.info("workers", extra={"workers": wanted, "partitions": len(units)})

    def _settle(self) -> None:
        """Take from each member what it should not have, and give what nobody else has any more."""
        changed = set()
        for at, member in self._members.items():
            member.leaving = {unit for unit in member.leaving if member.shows(unit)}
            excess = member.told.keys() - self._target.get(at, set())
            if excess:
                member.leaving |= {unit for unit in excess if member.running is not None}
                member.told = {unit: epoch for unit, epoch in member.told.items() if unit not in excess}
                changed.add(at)
        taken = {unit for member in self._members.values() for unit in (*member.told, *member.leaving)}
        for at, units in self._target.items():
            for unit in sorted(units - taken):
                self._members[at].told[unit] = self._next_epoch(unit)
                changed.add(at)
        for at in changed:
            member = self._members[at]
            if member.running is not None:
                member.actor.assign.remote(_by_view(member.told))

    def _next_epoch(self, unit: Unit) -> int:
        return 1 + self._checkpoints.epoch(unit.view, unit.partition)

    def _launch(self, member: _Member) -> None:
        member.told = {unit: self._next_epoch(unit) for unit in member.told}
        shares = _by_view(member.told)
        assignments = [
            Assignment(plan, shares.get(view, {}), keyed=self._counts[plan.topic] > 1)
            for view, plan in self._stage.items()
            if view in shares or not self._settings.until_caught_up
        ]
        options = ray.remote(StreamActor).options(num_cpus=0.2, max_restarts=0, max_concurrency=4)
        actor: Any = options.remote(self._store.config, self._settings, assignments)
        member.actor, member.running = actor, actor.run.remote()
        member.asked = None
        member.started_s = member.heard_s = time.monotonic()
        log.info("worker started", extra={"partitions": shares})

    def _watch(self, watches: Sequence[TopicWatch], growth: Growth) -> None:
        """One turn: who ended, who must start or stop, what moves; status now and then."""
        active = {member.running: member for member in self._members.values() if member.running is not None}
        if active:
            ended, _ = ray.wait(list(active), num_returns=1, timeout=WAIT_S)
            for reference in ended:
                self._ended(active[reference])
        else:
            time.sleep(WAIT_S)
        now_s = time.monotonic()
        if not self._stopping and not self._settings.until_caught_up:
            self._follow(watches, growth)
        if not self._stopping and not self._settings.by_group:
            self._settle()
        for member in self._members.values():
            if self._stopping or (member.surplus and not member.leaving):
                if member.running is None:
                    member.done = True
                else:
                    member.actor.stop.remote()
            elif member.running is None and not member.done and now_s >= member.restart_s:
                self._launch(member)
        self._members = {at: one for at, one in self._members.items() if not (one.surplus and one.done)}
        if now_s >= self._next_status_s:
            self._next_status_s = now_s + STATUS_S
            _require_node()
            self._ask()
            self._tell()

    def _follow(self, watches: Sequence[TopicWatch], growth: Growth) -> None:
        """See whether there should be another number of workers or are other numbers of partitions."""
        workers = self._report.workers() or self._workers
        found: dict[str, int] = {}
        for watch in watches:
            found |= watch.look()
        grown = growth.follow(self._counts, found)
        for topic, count in grown.items():
            log.warning(
                "the topic has more partitions: keys that moved to another partition start anew there, and their"
                " windows are whole again after their length",
                extra={"topic": topic, "partitions": count, "before": self._counts[topic]},
            )
        if grown or workers != self._workers:
            self._counts |= grown
            self._workers = workers
            self._scale()

    def _ended(self, member: _Member) -> None:
        reference, member.running = member.running, None
        try:
            member.status = ray.get(reference)
            self._report.remember(member.status)
            member.done = True
            return
        except RayTaskError as error:
            if isinstance(error.cause, StaleEpochError):
                self._raise_if_taken(member, error.cause)
            elif isinstance(error.cause, ValueError):
                raise SupervisorError(str(error.cause)) from error
            reason, crashed = repr(error.cause), True
        except RayActorError as error:
            reason, crashed = repr(error), False
        if time.monotonic() - member.started_s > HEALTHY_S:
            member.failures = 0
        member.failures += 1
        if crashed and member.failures >= FAILURES:
            raise SupervisorError(f"A stream worker failed {member.failures} times in a row; the last time: {reason}")
        pause_s = min(BACKOFF_S[0] * 2 ** (member.failures - 1), BACKOFF_S[1])
        member.restart_s = time.monotonic() + pause_s
        log.error("worker ended, starting it again", extra={"pause_s": pause_s, "reason": reason})

    def _raise_if_taken(self, member: _Member, error: StaleEpochError) -> None:
        """End where an owner that is not of this stream has a partition; one of this stream is only a late loser."""
        told = {unit: epoch for one in self._members.values() for unit, epoch in one.told.items()}
        if any(self._next_epoch(unit) - 1 > told[unit] for unit in member.told):
            raise SupervisorError(f"Another job computes the same view: {error}") from error

    def _ask(self) -> None:
        """Collect the status of each actor without waiting; one that is silent for too long is killed."""
        for member in self._members.values():
            if member.running is None or member.actor is None:
                continue
            if member.asked is None:
                member.asked = member.actor.status.remote()
            try:
                member.status = ray.get(member.asked, timeout=0.05) or member.status
                member.asked = None
                self._report.remember(member.status)
                if beating(member.status, SILENCE_S):
                    member.heard_s = time.monotonic()
            except GetTimeoutError:
                pass
            except RayActorError:
                continue
            if time.monotonic() - member.heard_s > SILENCE_S:
                log.error("worker is silent, killing it", extra={"silence_s": SILENCE_S})
                ray.kill(member.actor)

    def _tell(self) -> None:
        self._report.write([*self._ended_statuses, *(member.status for member in self._members.values())])


def _require_node() -> None:
    """Without its own node a job gets no worker any more, and isn't told so.

    Raises:
        SupervisorError: Ray has lost that node.
    """
    own = ray.get_runtime_context().get_node_id()
    if not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == own):  # type: ignore[no-untyped-call]
        raise SupervisorError("Ray lost the node of this job: start the job again, it goes on at its last checkpoints.")


def _by_view(units: dict[Unit, int]) -> dict[str, dict[int, int]]:
    """View to partition to epoch."""
    views: dict[str, dict[int, int]] = {}
    for unit, epoch in units.items():
        views.setdefault(unit.view, {})[unit.partition] = epoch
    return views
