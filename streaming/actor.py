"""The Ray actor that computes: it opens the workers of its share of the partitions and runs them in threads."""

import logging
import threading
from pathlib import Path
from typing import Any, NamedTuple

from feast import FeatureStore, FileSource, RepoConfig

from streaming.checkpoint import CheckpointStore
from streaming.logs import log_to_stderr
from streaming.offline import OfflineLog
from streaming.plan import Plan
from streaming.rejects import RejectLog
from streaming.sinks import OnlineSink
from streaming.wire import Consumer
from streaming.worker import Worker

log = logging.getLogger(__name__)


class Assignment(NamedTuple):
    """What one actor computes of one view."""

    plan: Plan
    partitions: tuple[int, ...]
    epoch: int
    keyed: bool


class StreamActor:
    """Runs the workers of its assignments, one thread each; meant to be a Ray actor with a few concurrent calls.

    Args:
        config: the Feast repository's configuration, with its environment variables already filled in.
        home: folder under which checkpoints are kept.
        assignments: views and partitions.
        until_caught_up: end when nothing is left to read.
    """

    def __init__(self, config: RepoConfig, home: str, assignments: list[Assignment], until_caught_up: bool) -> None:
        log_to_stderr()
        self._config, self._home, self._assignments = config, home, assignments
        self._until_caught_up = until_caught_up
        self._stop = threading.Event()
        self._workers: list[Worker] = []
        self._failures: list[Exception] = []

    def run(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Work until `stop` or until caught up; returns the last `status`.

        Raises:
            ValueError: something that trying again cannot help, in one sentence.
        """
        store = FeatureStore(repo_path=str(self._config.repo_path), config=self._config)
        for assignment in self._assignments:
            worker = open_worker(store, assignment, Path(self._home), ticking=not self._until_caught_up)
            self._workers.append(worker)
            worker.start(assignment.partitions)
        threads = [threading.Thread(target=self._work, args=(worker,)) for worker in self._workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for worker in self._workers:
            worker.close()
        if self._failures:
            raise self._failures[0]
        return self.status()

    def stop(self) -> None:
        """Finish the step at hand, checkpoint and let `run` return."""
        self._stop.set()

    def status(self) -> dict[str, dict[int, dict[str, Any]]]:
        """View to partition to figures; answers while `run` works."""
        return {worker.plan.view: worker.status() for worker in self._workers}

    def _work(self, worker: Worker) -> None:
        try:
            worker.run(self._stop, self._until_caught_up)
        except Exception as error:
            log.exception("worker failed", extra={"view": worker.plan.view})
            self._failures.append(error)
            self._stop.set()


def open_worker(store: FeatureStore, assignment: Assignment, home: Path, ticking: bool) -> Worker:
    """A worker with its consumer and sinks, not started."""
    plan = assignment.plan
    return Worker(
        plan,
        assignment.epoch,
        source=Consumer(plan.bootstrap_servers, plan.topic, group=f"millrace-{plan.view}"),
        online=OnlineSink(store, plan.view),
        offline=open_offline_log(store, plan, home),
        rejects=RejectLog(plan.bootstrap_servers, plan.topic, plan.view),
        checkpoints=CheckpointStore(checkpoint_uri(home)),
        ticking=ticking,
        keyed=assignment.keyed,
    )


def open_offline_log(store: FeatureStore, plan: Plan, home: Path) -> OfflineLog:
    """The folder of the view's batch source, which must be a glob of Parquet files; else one of ours, warned."""
    source = store.get_stream_feature_view(plan.view).batch_source
    path = source.path if isinstance(source, FileSource) else ""
    folder, _, pattern = str(FileSource.get_uri_for_file_path(store.repo_path, path)).rpartition("/")
    if source is None or pattern != "*.parquet":
        folder = str(home / "features" / "offline" / plan.view)
        log.warning(
            "the batch source is no glob of Parquet files (folder/*.parquet): the offline rows go elsewhere",
            extra={"view": plan.view, "batch_source": path, "folder": folder},
        )
        return OfflineLog(folder, plan.topic, plan.entity)
    return OfflineLog(
        folder,
        plan.topic,
        plan.entity,
        source.timestamp_field or "event_timestamp",
        source.created_timestamp_column or "created_timestamp",
    )


def checkpoint_uri(home: Path) -> str:
    """Where checkpoints are kept."""
    return str(home / "stream" / "checkpoints")
