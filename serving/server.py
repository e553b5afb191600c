"""The model server, in plain Python: registered models in memory, each behind a batcher, swapped without a gap."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from models.registry import ModelVersion
from serving import catalog
from serving.backend import Health, ModelStatus
from serving.batching import Batcher
from serving.errors import ServingError, deadline_passed
from serving.metrics import ModelMetrics
from serving.settings import BatchSettings
from serving.tasks import Tabular, Task

logger = logging.getLogger(__name__)

RETRY_LOAD_S = 30.0


class Versions(Protocol):
    """What is used of `models.registry.Registry`."""

    def resolve(self, name: str, alias: str) -> ModelVersion:
        """The version that an alias points at."""

    def download(self, version: ModelVersion, cache: Path) -> Path:
        """Its folder, fetched once."""


@dataclass(frozen=True)
class Prediction:
    """One answer: `Scores` or a transcript, and who gave it. `latency_s` is queue and model."""

    output: Any
    model: str
    version: int
    variant: str
    latency_s: float


class Loaded:
    """A version in memory; requests that hold its batcher keep it alive after a swap."""

    def __init__(self, version: ModelVersion, task: Task, limits: BatchSettings, metrics: ModelMetrics) -> None:
        self.version = version
        self.task = task
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"{version.name}-{version.version}")

        def observe(size: int, seconds: float) -> None:
            metrics.batch_size.labels(version.name).observe(size)
            metrics.batch_seconds.labels(version.name).observe(seconds)

        self.batcher: Batcher[Any, Any] = Batcher(
            task.execute,
            executor=self._executor,
            max_batch_size=limits.max_batch_size,
            max_queue=limits.max_queue,
            size=task.size,
            observe=observe,
        )

    def close(self) -> None:
        """Answer what is queued, then end the threads; does not wait."""
        self._executor.shutdown(wait=False)


class ModelServer:
    """Serves registered models by id: `name` for the default alias, `name@alias` for the others.

    Args:
        registry: resolves and downloads versions.
        cache: folder of downloaded versions.
        open_task: makes a loaded model of a version's folder.
        limits: batch settings by task.
        aliases: served aliases, the default one first.
        metrics: counts everything.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        registry: Versions,
        cache: Path,
        *,
        open_task: Callable[[Path], Task],
        limits: Mapping[str, BatchSettings],
        aliases: Sequence[str] = ("champion",),
        metrics: ModelMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._cache = cache
        self._open_task = open_task
        self._limits = limits
        self._aliases = tuple(aliases)
        self._metrics = metrics
        self._clock = clock
        self._lock = threading.Lock()
        self._loaded: dict[str, Loaded] = {}
        self._states: dict[str, ModelStatus] = {}
        self._retry_at: dict[tuple[str, int], float] = {}

    def load_model(self, name: str, alias: str | None = None) -> ModelStatus:
        """Load the version that an alias points at beside the one that answers now, then swap.

        The old version is freed after its last request. A failure leaves the old version in place.

        Raises:
            ValueError: the registry, the model's folder or its features refuse, in one sentence.
        """
        alias = alias or self._aliases[0]
        model = catalog.model_id(name, alias, self._aliases[0])
        version = self._registry.resolve(name, alias)
        loaded = self._in_memory(version) or self._load(version)
        with self._lock:
            old = self._loaded.get(model)
            self._loaded[model] = loaded
            status = ModelStatus(model, name, alias, version.version, loaded.task.task, "ready")
            self._states[model] = status
        self._metrics.version.labels(model, alias).set(version.version)
        logger.info("model %s answers with version %d", model, version.version)
        self._free(old)
        return status

    def unload_model(self, model: str) -> None:
        """Stop serving a model; requests that are queued are still answered.

        Raises:
            ServingError: status 404, it is not served.
        """
        with self._lock:
            status = self._states.pop(model, None)
            old = self._loaded.pop(model, None)
        if status is None:
            raise catalog.unknown(model, self._states)
        if old is not None:
            self._metrics.version.remove(model, status.variant)
        self._free(old)

    def _in_memory(self, version: ModelVersion) -> Loaded | None:
        with self._lock:
            same = (each for each in self._loaded.values() if each.version == version)
            return next(same, None)

    def _load(self, version: ModelVersion) -> Loaded:
        task = self._open_task(self._registry.download(version, self._cache))
        return Loaded(version, task, self._limits[task.task], self._metrics)

    def _free(self, old: Loaded | None) -> None:
        with self._lock:
            unused = old is not None and all(each is not old for each in self._loaded.values())
        if old is not None and unused:
            old.close()

    def follow(self, aliases: Mapping[tuple[str, str], int]) -> None:
        """Make what is served equal to the registry's aliases: load what is new, swap what moved, drop what is gone.

        A version that cannot be loaded is reported in the model's status and tried again half a minute later.
        """
        default = self._aliases[0]
        wanted = {
            catalog.model_id(name, alias, default): (name, alias, version)
            for (name, alias), version in aliases.items()
            if alias in self._aliases
        }
        with self._lock:
            gone = [model for model in self._states if model not in wanted]
            for model, (name, alias, _) in wanted.items():
                self._states.setdefault(model, ModelStatus(model, name, alias, 0, "", "loading"))
        for model in gone:
            self.unload_model(model)
        for model, (name, alias, version) in wanted.items():
            loaded = self._loaded.get(model)
            waits = self._clock() < self._retry_at.get((model, version), 0.0)
            if (loaded is None or loaded.version.version != version) and not waits:
                self._try_load(model, name, alias, version)

    def _try_load(self, model: str, name: str, alias: str, version: int) -> None:
        try:
            self.load_model(name, alias)
        except Exception as error:
            logger.exception("version %d of the model %s cannot be loaded", version, model)
            self._retry_at[(model, version)] = self._clock() + RETRY_LOAD_S
            with self._lock:
                old = self._loaded.get(model)
                self._states[model] = ModelStatus(
                    id=model,
                    name=name,
                    variant=alias,
                    version=old.version.version if old else 0,
                    task=old.task.task if old else "",
                    state="ready" if old else "failed",
                    error=f"version {version}: {error}",
                )

    def find(self, model: str, version: int | None = None) -> Loaded:
        """The version in memory that answers for a model now.

        Raises:
            ServingError: 404 for an unknown model or version, 503 for one that is registered and not loaded.
        """
        with self._lock:
            return self._find(model, version)

    def _find(self, model: str, version: int | None) -> Loaded:
        loaded = self._loaded.get(model)
        status = self._states.get(model)
        if loaded is None and status is not None:
            reason = f"could not be loaded ({status.error})" if status.state == "failed" else "is still loading"
            raise ServingError(503, f"the model {model} {reason}", "model_not_ready", "model", retry_after_s=5.0)
        if loaded is None:
            raise catalog.unknown(model, self._states)
        if version is not None and loaded.version.version != version:
            message = f"version {version} of the model {model} is not served; version {loaded.version.version} is"
            raise ServingError(404, message, "model_not_found", "model")
        return loaded

    def _submit(
        self, model: str, item: Any, version: int | None, timeout_s: float | None
    ) -> tuple[Loaded, Future[Any]]:
        with self._lock:  # between finding and submitting no swap may close the batcher
            loaded = self._find(model, version)
            if isinstance(loaded.task, Tabular):
                loaded.task.check(item)
            return loaded, loaded.batcher.submit(item, timeout_s)

    async def predict_async(
        self, model: str, item: Any, *, version: int | None = None, timeout_s: float | None = None
    ) -> Prediction:
        """One prediction, batched with whatever is asked meanwhile; cancelling it takes it out of the queue.

        Args:
            model: a model's id.
            item: `Rows` for a tabular model, a wave for a speech model.
            version: refuse any other version.
            timeout_s: deadline of the whole.

        Raises:
            ServingError: unknown model, full queue, deadline, bad input; other errors are the model's own.
        """
        with self._counted(model) as counted:
            loaded, future = self._submit(model, item, version, timeout_s)
            try:
                output = await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)
            except TimeoutError:
                raise deadline_passed(timeout_s or 0.0) from None
            return self._answer(model, loaded, output, counted.elapsed_s())

    def predict(
        self, model: str, item: Any, *, version: int | None = None, timeout_s: float | None = None
    ) -> Prediction:
        """The same for callers without an event loop; blocks."""
        with self._counted(model) as counted:
            loaded, future = self._submit(model, item, version, timeout_s)
            try:
                output = future.result(timeout_s)
            except TimeoutError:
                future.cancel()
                raise deadline_passed(timeout_s or 0.0) from None
            return self._answer(model, loaded, output, counted.elapsed_s())

    def predict_batch(
        self, model: str, items: Sequence[Any], *, timeout_s: float | None = None
    ) -> list[Prediction | Exception]:
        """Predictions in the order of the items; an item that fails gives its exception in its place.

        Raises:
            ServingError: the model is unknown or not loaded.
        """
        self.find(model)
        with ThreadPoolExecutor(min(len(items), 64) or 1) as callers:
            futures = [callers.submit(self.predict, model, item, timeout_s=timeout_s) for item in items]
        return [future.exception() or future.result() for future in futures]  # type: ignore[misc]

    def _answer(self, model: str, loaded: Loaded, output: Any, latency_s: float) -> Prediction:
        variant = model.partition("@")[2] or self._aliases[0]
        return Prediction(output, model, loaded.version.version, variant, latency_s)

    def _counted(self, model: str) -> "_Counted":
        return _Counted(self._metrics, model if model in self._states else "unknown", self._clock)

    def models(self) -> tuple[ModelStatus, ...]:
        """Every registered model with a served alias, by id."""
        with self._lock:
            return tuple(self._states[model] for model in sorted(self._states))

    def health_check(self) -> Health:
        """Status, models, requests that wait, and figures by model."""
        models = self.models()
        states = {model.state for model in models}
        status: Literal["ready", "loading", "degraded"] = "ready"
        if "loading" in states:
            status = "loading"
        elif any(model.error for model in models):
            status = "degraded"
        metrics = self.get_metrics()
        return Health(status, models, int(sum(each["queue_size"] for each in metrics.values())), metrics)

    def get_metrics(self) -> dict[str, dict[str, float]]:
        """By model: requests, errors, mean latency in ms, mean batch size, and how many wait now."""
        with self._lock:
            waiting = {model: loaded.batcher.queue_size for model, loaded in self._loaded.items()}
        for model, size in waiting.items():
            self._metrics.queue_depth.labels(model).set(size)
        return {model: self._metrics.of_model(model) | {"queue_size": size} for model, size in waiting.items()}

    def close(self) -> None:
        """Stop serving; what is queued is still answered."""
        with self._lock:
            loaded = set(self._loaded.values())
            self._loaded.clear()
            self._states.clear()
        for each in loaded:
            each.close()


class _Counted:
    """Counts a request, its time and its failure."""

    def __init__(self, metrics: ModelMetrics, model: str, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._model = model
        self._clock = clock
        self._started = clock()

    def elapsed_s(self) -> float:
        return self._clock() - self._started

    def __enter__(self) -> "_Counted":
        self._metrics.requests.labels(self._model).inc()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            self._metrics.seconds.labels(self._model).observe(self.elapsed_s())
            return
        code = error.code if isinstance(error, ServingError) else "model_error"
        code = "cancelled" if isinstance(error, asyncio.CancelledError) else code
        self._metrics.errors.labels(self._model, code).inc()
