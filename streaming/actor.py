"""The Ray actor that computes: it opens the workers of its share of the partitions and runs them in threads."""

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ray
from feast import FeatureStore, RepoConfig
from feast.data_source import PushMode

from streaming.allowance import Allowance
from streaming.changelog import ChangelogSink, Published
from streaming.checkpoint import CheckpointStore
from streaming.consumer import Consumer
from streaming.control import DriftLog
from streaming.deriving.commits import DELTAS
from streaming.deriving.derivation import Derivation
from streaming.deriving.deriver import Deriver
from streaming.deriving.operators import open_operator
from streaming.deriving.transactions import Transactions, group
from streaming.group import GroupMember
from streaming.holding import NoOffline, NoOnline, Online
from streaming.logs import log_to_stderr
from streaming.metrics import StreamMetrics, serve
from streaming.offline import OfflineLog
from streaming.plan import Plan
from streaming.rejects import RejectLog
from streaming.sinks import OnlineSink
from streaming.views import log_place
from streaming.worker import Worker

log = logging.getLogger(__name__)


class Settings(NamedTuple):
    """What all actors of a stream have in common.

    Attributes:
        home: Folder for what has no other place.
        checkpoints: Path or URI of the folder where checkpoints are kept; all workers reach it.
        flush_s: Pause between writes to the online store.
        until_caught_up: End when nothing is left to read.
        by_group: Partitions come from a Kafka consumer group.
        max_state_bytes: Memory that the states of an actor may take together.
    """

    home: str
    checkpoints: str
    flush_s: float
    until_caught_up: bool = False
    by_group: bool = False
    max_state_bytes: int | None = None


class Assignment(NamedTuple):
    """What one actor computes of one view or derivation.

    Attributes:
        plan: What to compute.
        partitions: Of its topic, each with its epoch.
        keyed: Whether records must be keyed by the entity, or by what they are joined on.
    """

    plan: Plan | Derivation
    partitions: Mapping[int, int]
    keyed: bool


class StreamActor:
    """Runs a worker for each view and derivation, one thread each; meant to be a Ray actor with some concurrent calls.

    Args:
        config: the Feast repository's configuration, with its environment variables already filled in.
        settings: what all actors have in common.
        assignments: views and partitions to begin with.
    """

    def __init__(self, config: RepoConfig, settings: Settings, assignments: list[Assignment]) -> None:
        log_to_stderr()
        self._config, self._settings, self._assignments = config, settings, assignments
        self._wanted: Mapping[str, Mapping[int, int]] = {one.plan.view: one.partitions for one in assignments}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._workers: dict[str, Worker | Deriver] = {}
        self._failures: list[Exception] = []
        self._metrics = ""

    def run(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Work until `stop` or until caught up; returns the last `status`.

        Raises:
            ValueError: something that trying again cannot help, in one sentence.
        """
        store = FeatureStore(repo_path=str(self._config.repo_path), config=self._config)
        metrics = StreamMetrics(self.status, lambda: {view: one.measures for view, one in self._workers.items()})
        self._metrics, stop_metrics = serve(metrics, str(ray.util.get_node_ip_address()))  # type: ignore[no-untyped-call]
        members: list[GroupMember] = []
        limit_bytes = self._settings.max_state_bytes
        allowance = None if limit_bytes is None else Allowance(limit_bytes)
        for assignment in self._assignments:
            worker: Worker | Deriver
            if isinstance(assignment.plan, Derivation):
                worker = open_deriver(store, assignment.plan, assignment.keyed, self._settings, allowance)
            else:
                worker = open_worker(store, assignment.plan, assignment.keyed, self._settings, allowance)
            with self._lock:
                self._workers[assignment.plan.view] = worker
                partitions = self._wanted.get(assignment.plan.view, {})
            worker.start(partitions)
            if self._settings.by_group:
                members.append(join_group(worker))
        threads = [threading.Thread(target=self._work, args=(worker,)) for worker in self._workers.values()]
        for thread in threads:
            thread.start()
        for member in members:
            member.start()
        for thread in threads:
            thread.join()
        for member in members:
            member.stop()
        for worker in self._workers.values():
            worker.close()
        stop_metrics()
        if self._failures:
            raise self._failures[0]
        return self.status()

    def assign(self, partitions: Mapping[str, Mapping[int, int]]) -> None:
        """Change to these partitions (view to partition to epoch) as soon as the steps at hand are done."""
        with self._lock:
            self._wanted = partitions
            for view, worker in self._workers.items():
                worker.assign(partitions.get(view, {}))

    def stop(self) -> None:
        """Finish the step at hand, checkpoint and let `run` return."""
        self._stop.set()

    def status(self) -> dict[str, dict[int, dict[str, Any]]]:
        """View to partition to figures; answers while `run` works."""
        return {
            view: {number: figures | {"metrics": self._metrics} for number, figures in worker.status().items()}
            for view, worker in list(self._workers.items())
        }

    def _work(self, worker: Worker | Deriver) -> None:
        try:
            worker.run(self._stop, self._settings.until_caught_up)
        except Exception as error:
            log.exception("worker failed", extra={"view": worker.plan.view})
            self._failures.append(error)
            self._stop.set()


def open_worker(
    store: FeatureStore,
    plan: Plan,
    keyed: bool,
    settings: Settings,
    allowance: Allowance | None = None,
    to: PushMode = PushMode.ONLINE_AND_OFFLINE,
) -> Worker:
    """A worker with its consumer and the sinks of `to`, not started."""
    return Worker(
        plan,
        source=Consumer(plan.bootstrap_servers, plan.topic, group=f"millrace-{plan.view}"),
        online=NoOnline() if to == PushMode.OFFLINE else _online(store, plan),
        offline=NoOffline() if to == PushMode.ONLINE else open_offline_log(store, plan, Path(settings.home)),
        rejects=RejectLog(plan.bootstrap_servers, plan.topic, plan.view),
        checkpoints=CheckpointStore(settings.checkpoints),
        drifts=DriftLog(plan.bootstrap_servers, plan.view) if plan.models else None,
        ticking=not settings.until_caught_up,
        keyed=keyed,
        shared=settings.by_group,
        flush_s=settings.flush_s,
        allowance=allowance,
    )


def open_deriver(
    store: FeatureStore, derivation: Derivation, keyed: bool, settings: Settings, allowance: Allowance | None = None
) -> Deriver:
    """A deriver with its consumers and reject logs, not started."""
    inputs = derivation.inputs
    return Deriver(
        derivation,
        sources=[Consumer(each.bootstrap_servers, each.topic, group(derivation)) for each in inputs],
        rejects=[RejectLog(each.bootstrap_servers, each.topic, derivation.name) for each in inputs],
        checkpoints=CheckpointStore(settings.checkpoints, DELTAS),
        operator=open_operator(derivation, store),
        output=lambda partition: Transactions(derivation, partition),
        ticking=not settings.until_caught_up,
        keyed=keyed,
        shared=settings.by_group,
        allowance=allowance,
    )


def _online(store: FeatureStore, plan: Plan) -> Online:
    online = OnlineSink(store, plan.view)
    return Published(online, ChangelogSink(plan.bootstrap_servers, plan.changelog)) if plan.changelog else online


def join_group(worker: Worker | Deriver) -> GroupMember:
    """A member of the view's consumer group that gives the worker its partitions, not started."""

    def assign(numbers: set[int], lost: bool) -> None:
        worker.assign(dict.fromkeys(numbers, 0), discard=lost)

    plan = worker.plan
    return GroupMember(plan.bootstrap_servers, f"millrace-{plan.view}-workers", plan.topic, assign, worker.holds)


def open_offline_log(store: FeatureStore, plan: Plan, home: Path) -> OfflineLog:
    """The log of a view, where its declaration says."""
    place = log_place(store, plan.view, home)
    return OfflineLog(place.folder, plan.topic, plan.entity, place.event_timestamp, place.created_timestamp)


def checkpoint_uri(home: Path) -> str:
    """Where checkpoints are kept unless somebody says otherwise."""
    return str(home / "stream" / "checkpoints")
