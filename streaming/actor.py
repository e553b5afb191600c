"""The Ray actor that computes: it opens the workers of its share of the partitions and runs them in threads."""

import logging
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import ray
from feast import FeatureStore, RepoConfig

from streaming.allowance import Allowance
from streaming.deriving.derivation import Derivation
from streaming.deriving.deriver import Deriver
from streaming.group import GroupMember
from streaming.logs import log_to_stderr
from streaming.metrics import StreamMetrics, serve
from streaming.opening import Settings, open_deriver, open_worker
from streaming.plan import Plan
from streaming.worker import Worker

log = logging.getLogger(__name__)


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


def join_group(worker: Worker | Deriver) -> GroupMember:
    """A member of the view's consumer group that gives the worker its partitions, not started."""

    def assign(numbers: set[int], lost: bool) -> None:
        worker.assign(dict.fromkeys(numbers, 0), discard=lost)

    plan = worker.plan
    return GroupMember(plan.bootstrap_servers, f"millrace-{plan.view}-workers", plan.topic, assign, worker.holds)
