"""Feast's stream processor without Spark: a view computed from its KafkaSource by a thread of the caller's process.

It is the worker of `ray_jobs/stream_features.py`, over the same plan, sinks and checkpoints, without Ray and without a
supervisor: nobody starts it again when it fails, and partitions that a topic gains are read from the next start on.
"""

import logging
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from feast import FeatureStore, KafkaSource
from feast.data_source import PushMode
from feast.stream_feature_view import StreamFeatureView

from streaming.allowance import Allowance, share_bytes
from streaming.deriving.derivation import TAG
from streaming.deriving.topology import prepare
from streaming.opening import Settings, checkpoint_uri, open_worker
from streaming.plan import Plan, PlanError
from streaming.views import compile_view, plans
from streaming.worker import FLUSH_S, Worker

log = logging.getLogger(__name__)


class Ingestion:
    """A view that is being ingested; as Spark's StreamingQuery, it ends when it is stopped or when it fails.

    A process that ends without `stop` is a crash like any other: the next start goes on at the last checkpoint.

    Args:
        worker: started; closed at the end.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"ingest-{worker.plan.view}", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for its end, for ever by default; whether it has ended.

        Raises:
            Exception: what the worker has raised, as it was.
        """
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True

    def stop(self) -> None:
        """Finish the step at hand, write and checkpoint everything, and end; returns when that is done.

        Raises:
            Exception: what the worker has raised, as `wait` does.
        """
        self._stop.set()
        self.wait()

    def status(self) -> dict[int, dict[str, Any]]:
        """Partition to its figures (lag, processed, dead, late, watermark, ...), at most a second old."""
        return self._worker.status()

    def _run(self) -> None:
        try:
            with closing(self._worker):
                self._worker.run(self._stop, until_caught_up=False)
        except Exception as error:
            log.exception("ingestion failed", extra={"view": self._worker.plan.view})
            self._error = error


class MillraceStreamProcessor:
    """Feast's `StreamProcessor` over our worker.

    It is no subclass, since the module of that class imports pyspark, and lacks its private steps, which hand Spark's
    tables on. `get_stream_processor_object` knows Spark only: call this constructor instead.

    Attributes:
        fs: The feature store.
        sfv: The view.
        data_source: Its KafkaSource.

    Args:
        fs: its registry has the view.
        sfv: as it was applied.
        home: folder of checkpoints: `MILLRACE_HOME`, where those of a job without `--checkpoints` are.

    Raises:
        PlanError: the view cannot be computed, was applied otherwise, or reads a derived topic.
    """

    fs: FeatureStore
    sfv: StreamFeatureView
    data_source: KafkaSource

    def __init__(self, fs: FeatureStore, sfv: StreamFeatureView, home: Path) -> None:
        self.fs, self.sfv = fs, sfv
        self._plan = _plan(fs, sfv)
        self.data_source = cast(KafkaSource, sfv.stream_source)  # else there is no plan
        if TAG in self.data_source.tags:
            raise PlanError(
                f"View '{sfv.name}' reads the derived topic '{self.data_source.name}', which the stream job computes:"
                f" run `ray_jobs/stream_features.py --views {sfv.name}`."
            )
        self._settings = Settings(str(home.absolute()), checkpoint_uri(home.absolute()), FLUSH_S)

    def ingest_stream_feature_view(self, to: PushMode = PushMode.ONLINE) -> Ingestion:
        """Take all partitions of the topic over and ingest them, from their checkpoints or else from the beginning.

        Whoever had them before, a job or another ingestion with the same checkpoints, is fenced: it ends with a
        StaleEpochError.

        `to` alone decides what is written: the online store with the changelog, or the Parquet log of the view's batch
        source, or both, as the job does. The view's `offline` flag does not count, because Feast's registry drops it.
        A view with `online=False` has no place online, so that is refused. Checkpoints do not know of `to`: what one
        store was not given is not made up for by a later start that writes it.

        Raises:
            PlanError: `to` includes the online store and the view is not online.
            SupervisorError: no broker answers.
            OffsetError, StateError: the checkpoint does not fit the topic or the view.
        """
        if to != PushMode.OFFLINE and not self.sfv.online:
            raise PlanError(f"View '{self.sfv.name}' is declared with online=False: use PushMode.OFFLINE.")
        partitions = prepare([self._plan], lambda: False)[self._plan.topic]
        # A store of its own, because a connection of Feast's stores is not for several threads.
        store = FeatureStore(repo_path=str(self.fs.repo_path), config=self.fs.config)
        allowance = Allowance(share_bytes(workers=1))
        worker = open_worker(store, self._plan, partitions > 1, self._settings, allowance, to)
        try:
            worker.start(dict.fromkeys(range(partitions), 0))
        except BaseException:
            worker.close()
            raise
        return Ingestion(worker)


def _plan(fs: FeatureStore, sfv: StreamFeatureView) -> Plan:
    """The plan of a view that was applied as it is."""
    (plan,) = plans(fs, [sfv.name])
    given = compile_view(sfv, plan.entity, plan.entity_type)
    if replace(given, transformation=None) != replace(plan, transformation=None):  # its text is compared
        raise PlanError(f"View '{sfv.name}' is not declared as the registry has it: run `feast apply` first.")
    return plan
