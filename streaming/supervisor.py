"""Spreads the partitions of all views over worker actors, starts killed ones again, and tells how it goes.

A restarted worker gets a newer epoch, so the one that it replaces can write nothing more should it still live.
`status.json` under the home's `stream` folder is rewritten every second: views, partitions, lags, counts, heartbeats.
"""

import dataclasses
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
from feast import FeatureStore
from kafka.errors import KafkaError
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from streaming import events
from streaming.actor import Assignment, StreamActor, checkpoint_uri
from streaming.checkpoint import CheckpointStore
from streaming.plan import Plan
from streaming.rejects import ensure_topics
from streaming.worker import stream_name

log = logging.getLogger(__name__)

WAIT_S = 0.25
STATUS_S = 1.0
BACKOFF_S = (0.2, 10.0)
BROKER_S = 60.0
SILENCE_S = 120.0
HEALTHY_S = 60.0
FAILURES = 5
PARTITIONS = {topic.name: topic.partitions for topic in vars(events).values() if isinstance(topic, events.Topic)}


class SupervisorError(ValueError):
    """Why a stream cannot run, in one sentence."""


@dataclass
class _Member:
    """One worker actor and its history."""

    shares: list[tuple[Plan, tuple[int, ...], bool]]
    actor: Any = None
    running: Any = None
    asked: Any = None
    started_s: float = 0.0
    heard_s: float = 0.0
    restart_s: float = 0.0
    failures: int = 0
    status: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    done: bool = False


class Supervisor:
    """Runs views on worker actors until stopped or caught up.

    Args:
        store: the Feast store of the views.
        plans: what to compute.
        home: folder under which checkpoints and `status.json` are kept.
        workers: how many actors share the partitions; not more are started than there are partitions.
        until_caught_up: end when every record that is there has been processed and checkpointed.
        bootstrap_servers: the broker to read from instead of the one that the views name.
    """

    def __init__(
        self,
        store: FeatureStore,
        plans: Sequence[Plan],
        *,
        home: Path,
        workers: int = 1,
        until_caught_up: bool = False,
        bootstrap_servers: str | None = None,
    ) -> None:
        if not plans:
            raise SupervisorError("There is no stream feature view to compute: declare one and run `feast apply`.")
        if workers < 1:
            raise SupervisorError(f"A stream needs at least one worker, not {workers}.")
        self._plans = [
            dataclasses.replace(plan, bootstrap_servers=bootstrap_servers or plan.bootstrap_servers) for plan in plans
        ]
        self._store, self._home, self._workers = store, home.absolute(), workers
        self._until_caught_up = until_caught_up
        self._checkpoints = CheckpointStore(checkpoint_uri(self._home))
        self._members: list[_Member] = []
        self._stopping = False
        self._first: dict[tuple[str, int], int] = {}
        self._next_status_s = 0.0

    def run(self) -> dict[str, dict[str, float]]:
        """Work until done; returns for each view its counts and rate.

        `processed`, `dead` and `late` count all records up to the last checkpoint and add up to what was produced;
        `seconds` and `events_per_s` are of this run.

        Raises:
            SupervisorError: no broker, or something that trying again cannot help.
        """
        self._members = [_Member(shares) for shares in self._shares()]
        try:
            for member in self._members:
                self._launch(member)
            while not all(member.done for member in self._members):
                self._watch()
            self._report()
        finally:
            for member in self._members:
                if member.actor is not None:
                    ray.kill(member.actor)
        return self._totals()

    def stop(self) -> None:
        """Let every worker flush and checkpoint, then `run` return; safe in a signal handler."""
        self._stopping = True

    def _shares(self) -> list[list[tuple[Plan, tuple[int, ...], bool]]]:
        """Which partitions of which views each actor takes: dealt out one by one."""
        dealt: list[dict[int, list[int]]] = [{} for _ in range(self._workers)]
        keyed = {}
        turn = 0
        for index, plan in enumerate(self._plans):
            count = self._partitions(plan)
            keyed[index] = count > 1
            for partition in range(count):
                dealt[turn % self._workers].setdefault(index, []).append(partition)
                turn += 1
        return [
            [(self._plans[index], tuple(partitions), keyed[index]) for index, partitions in share.items()]
            for share in dealt
            if share
        ]

    def _partitions(self, plan: Plan) -> int:
        """Number of partitions of a plan's topic, which is created with its reject topics if it is not there."""
        topics = {plan.topic: PARTITIONS.get(plan.topic, 1), events.dead(plan.topic): 1, events.late(plan.topic): 1}
        deadline_s = time.monotonic() + BROKER_S
        while True:
            try:
                return ensure_topics(plan.bootstrap_servers, topics)[plan.topic]
            except KafkaError as error:
                if time.monotonic() > deadline_s or self._stopping:
                    raise SupervisorError(
                        f"No Kafka broker answers at {plan.bootstrap_servers} (view {plan.view!r}): start one, or set"
                        f" KAFKA_BOOTSTRAP_SERVERS. {error!r}"
                    ) from error
                log.warning("no broker yet", extra={"servers": plan.bootstrap_servers, "error": repr(error)})
                time.sleep(1.0)

    def _launch(self, member: _Member) -> None:
        assignments = []
        for plan, partitions, keyed in member.shares:
            epoch = 1 + max(self._checkpoints.epoch(stream_name(plan), partition) for partition in partitions)
            assignments.append(Assignment(plan, partitions, epoch, keyed))
        options = ray.remote(StreamActor).options(num_cpus=0.2, max_restarts=0, max_concurrency=4)
        actor: Any = options.remote(self._store.config, str(self._home), assignments, self._until_caught_up)
        member.actor, member.running = actor, actor.run.remote()
        member.asked = None
        member.started_s = member.heard_s = time.monotonic()
        log.info("worker started", extra={"partitions": {item.plan.view: item.partitions for item in assignments}})

    def _watch(self) -> None:
        """One turn: who ended, who must start again, who must stop; status now and then."""
        active = {member.running: member for member in self._members if member.running is not None}
        if active:
            ended, _ = ray.wait(list(active), num_returns=1, timeout=WAIT_S)
            for reference in ended:
                self._ended(active[reference])
        else:
            time.sleep(WAIT_S)
        now_s = time.monotonic()
        for member in self._members:
            if self._stopping:
                if member.running is None:
                    member.done = True
                elif member.actor is not None:
                    member.actor.stop.remote()
            elif member.running is None and not member.done and now_s >= member.restart_s:
                self._launch(member)
        if now_s >= self._next_status_s:
            self._next_status_s = now_s + STATUS_S
            self._ask()
            self._report()

    def _ended(self, member: _Member) -> None:
        reference, member.running = member.running, None
        try:
            member.status = ray.get(reference)
            self._remember(member)
            member.done = True
            return
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
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

    def _ask(self) -> None:
        """Collect the status of each actor without waiting; one that is silent for too long is killed."""
        for member in self._members:
            if member.running is None or member.actor is None:
                continue
            if member.asked is None:
                member.asked = member.actor.status.remote()
            try:
                member.status = ray.get(member.asked, timeout=0.05) or member.status
                member.asked = None
                self._remember(member)
                if _beating(member.status):
                    member.heard_s = time.monotonic()
            except GetTimeoutError:
                pass
            except RayActorError:
                continue
            if time.monotonic() - member.heard_s > SILENCE_S:
                log.error("worker is silent, killing it", extra={"silence_s": SILENCE_S})
                ray.kill(member.actor)

    def _remember(self, member: _Member) -> None:
        """Keep what each partition had counted before this run, for the rate of this run."""
        for view, partitions in member.status.items():
            for number, figures in partitions.items():
                total = figures["processed"] + figures["dead"] + figures["late"]
                self._first.setdefault((view, number), total - figures["read"])

    def _report(self) -> None:
        views: dict[str, dict[int, dict[str, Any]]] = {}
        for member in self._members:
            for view, partitions in member.status.items():
                views.setdefault(view, {}).update(partitions)
        path = self._home / "stream" / "status.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        report = {"updated": datetime.now(UTC).isoformat(), "pid": os.getpid(), "views": views}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(report, indent=1))
        temporary.replace(path)

    def _totals(self) -> dict[str, dict[str, float]]:
        totals: dict[str, dict[str, float]] = {}
        for plan in self._plans:
            figures = {
                number: partition
                for member in self._members
                for number, partition in member.status.get(plan.view, {}).items()
            }
            seconds = max((row["seconds"] for row in figures.values()), default=0.0)
            names = ("processed", "dead", "late", "keys")
            counted = {name: sum(row[name] for row in figures.values()) for name in names}
            before = sum(self._first.get((plan.view, number), 0) for number in figures)
            read = counted["processed"] + counted["dead"] + counted["late"] - before
            totals[plan.view] = counted | {
                "seconds": round(seconds, 3),
                "events_per_s": round(read / seconds, 1) if seconds else 0.0,
            }
        return totals


def _beating(status: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> bool:
    """Whether every worker's loop has turned within the time that it may be silent."""
    beats = [datetime.fromisoformat(row["heartbeat"]) for rows in status.values() for row in rows.values()]
    return all((datetime.now(UTC) - beat).total_seconds() < SILENCE_S for beat in beats)
