"""The models' side of the application: requests of any protocol in, answers and prediction records out.

It owns the model server, the watcher, the feature store and the log of predictions. Ray Serve runs it as a deployment;
tests and other programs can hold it in their own process.
"""

import asyncio
import functools
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from models import predictor as predictors
from models.registry import Registry
from serving import catalog
from serving.backend import (
    Answered,
    Caller,
    Health,
    Inference,
    Metadata,
    ModelStatus,
    Segment,
    TensorSpec,
    Transcription,
)
from serving.errors import ServingError, bad_request
from serving.features import FeatureReader, open_store
from serving.metrics import ModelMetrics
from serving.predictions import PredictionLog, connect
from serving.server import ModelServer, Prediction
from serving.settings import Settings
from serving.tasks import Rows, Scores, Speech, Tabular, Task, Wave, read_rows
from serving.tensors import Tensor
from serving.watcher import Watcher

logger = logging.getLogger(__name__)


def open_task(folder: Path, settings: Settings, metrics: ModelMetrics) -> Task:
    """Load the model in a folder and whatever its task needs; one torch thread, because requests are the parallelism.

    Raises:
        ValueError: no model, a task that is not served, or features that are not in Feast.
    """
    model: Any = predictors.load(folder)
    if model.task == Speech.task:
        import torch

        torch.set_num_threads(1)
        return Speech(model)
    if model.task != Tabular.task:
        raise ServingError(500, f"{folder} has the task {model.task!r}, which is not served", "unknown_task")
    reader = None
    if model.feature_service:

        def count(view: str, reason: str, rows: int) -> None:
            metrics.feature_misses.labels(view, reason).inc(rows)

        reader = FeatureReader(
            open_store(settings.features.repo),
            model.feature_service,
            model.features,
            clock=settings.features.clock,
            deadline_s=settings.features.deadline_ms / 1e3,
            count=count,
        )
    return Tabular(model, reader)


class ModelService:
    """Serves the registered models until closed.

    Args:
        settings: of the application.
        server: None for one over the settings' registry, followed by a watcher.
        log: None for one to the settings' broker, if there is any.
        metrics: shared with `server` and `log` where those are given.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        server: ModelServer | None = None,
        log: PredictionLog | None = None,
        metrics: ModelMetrics | None = None,
    ) -> None:
        os.environ["MILLRACE_HOME"] = str(settings.home)  # feature_store.yaml refers to it
        self._settings = settings
        self._metrics = metrics or ModelMetrics()
        self._watcher: Watcher | None = None
        if server is None:
            registry = Registry(settings.mlflow_tracking_uri)
            server = ModelServer(
                registry,
                settings.home / "models",
                open_task=functools.partial(open_task, settings=settings, metrics=self._metrics),
                limits={"whisper": settings.whisper, "tabular": settings.tabular},
                aliases=settings.aliases,
                metrics=self._metrics,
            )
            self._watcher = Watcher(registry.aliases, server.follow, interval_s=settings.poll_s)
            self._watcher.start()
        self._server = server
        if log is None and settings.kafka_bootstrap_servers:
            log = PredictionLog(
                functools.partial(connect, settings.kafka_bootstrap_servers),
                max_queue=settings.predictions.max_queue,
                on_published=self._metrics.published.inc,
                on_dropped=lambda reason, count: self._metrics.dropped.labels(reason).inc(count),
            )
        self._log = log

    async def models(self) -> tuple[ModelStatus, ...]:
        """Every registered model, by id."""
        return self._server.models()

    async def health(self) -> Health:
        """The server's health; `loading` also until the registry has been read once."""
        health = self._server.health_check()
        if self._watcher is not None and not self._watcher.seen:
            return replace(health, status="loading")
        return health

    async def metrics(self) -> str:
        """Prometheus text."""
        self._server.get_metrics()
        return self._metrics.render()

    def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises."""
        if self._watcher is not None and not self._watcher.alive:
            raise RuntimeError("the registry's watcher has ended")

    async def metadata(self, model: str, version: int | None) -> Metadata:
        """Inputs and outputs of a model."""
        loaded = self._server.find(model, version)
        number = loaded.version.version
        if isinstance(loaded.task, Speech):
            outputs = (TensorSpec("text", "BYTES"), TensorSpec("confidence", "FP64"))
            return Metadata(model, number, "pytorch_transformers", (TensorSpec("audio", "BYTES"),), outputs)
        features = (TensorSpec(name, "FP64") for name in loaded.task.features)
        outputs = (TensorSpec("probability", "FP64"), TensorSpec(catalog.decision(loaded.version.name), "BOOL"))
        return Metadata(model, number, "sklearn", (TensorSpec("entity", "BYTES"), *features), outputs)

    async def load(self, model: str) -> None:
        """Look at the registry now instead of at the next poll; fails when the model does not answer after it."""
        if self._watcher is not None:
            await asyncio.to_thread(self._watcher.poll)
        self._server.find(model)

    async def transcribe(self, model: str, audio: bytes, caller: Caller) -> Transcription:
        """The words of an audio file; what is longer than the model's window is cut at quiet moments.

        Raises:
            ServingError: status 400 for audio that cannot be read or is too long, and for a model that does not hear.
        """
        loaded = self._server.find(model)
        if not isinstance(loaded.task, Speech):
            raise bad_request(f"the model {model} does not transcribe; ask it at /v2/models/{model}/infer", "model")
        rate_hz = loaded.task.sample_rate_hz
        longest = int(loaded.task.max_seconds * rate_hz)
        wave, cuts = await asyncio.to_thread(_decode, audio, rate_hz, self._settings.max_audio_s, longest)
        borders = list(itertools.pairwise([0, *cuts, len(wave)]))
        asked = (
            self._server.predict_async(model, wave[start:end], timeout_s=self._settings.timeout_s)
            for start, end in borders
        )
        predictions = await asyncio.gather(*asked)
        segments = tuple(
            Segment(start / rate_hz, end / rate_hz, each.output.text.strip(), each.output.confidence)
            for each, (start, end) in zip(predictions, borders, strict=True)
        )
        first = predictions[0]
        answer = Transcription(_by(first), segments, len(wave) / rate_hz)
        confidence = min(segment.confidence for segment in segments)
        output = {"text": answer.text, "confidence": confidence}
        latency_s = max(each.latency_s for each in predictions)
        self._publish(caller.request_id, caller.entity, replace(first, latency_s=latency_s), {}, {}, output)
        return answer

    async def infer(self, model: str, version: int | None, inputs: Sequence[Tensor], caller: Caller) -> Inference:
        """Output tensors for input tensors, see `metadata`.

        A tabular model takes the entity of the caller for one row, or an input `entity` of BYTES [N]; features that are
        inputs go before the store's. A speech model takes `audio`, files as BYTES [N].

        Raises:
            ServingError: 400 for inputs that the model does not know or that do not fit together.
        """
        task = self._server.find(model, version).task
        if isinstance(task, Speech):
            return await self._infer_speech(model, inputs, caller)
        rows = read_rows(inputs, task.features, caller.entity)
        timeout_s = self._settings.timeout_s
        prediction = await self._server.predict_async(model, rows, version=version, timeout_s=timeout_s)
        scores: Scores = prediction.output
        name = catalog.decision(model.partition("@")[0])
        self._publish_rows(caller, rows, prediction, name)
        outputs = (Tensor("probability", "FP64", scores.probability), Tensor(name, "BOOL", scores.decision))
        return Inference(_by(prediction), outputs)

    async def _infer_speech(self, model: str, inputs: Sequence[Tensor], caller: Caller) -> Inference:
        if [(each.name, each.datatype) for each in inputs] != [("audio", "BYTES")] or not inputs[0].data.size:
            raise bad_request(f"the model {model} takes one input: audio, of BYTES [N], whole files", "inputs")
        files = inputs[0].data.ravel()
        asked = (
            self.transcribe(model, file, replace(caller, request_id=_row_id(caller.request_id, row, len(files))))
            for row, file in enumerate(files)
        )
        answers = await asyncio.gather(*asked)
        text = np.array([answer.text.encode() for answer in answers], dtype=object)
        confidence = np.array([min(segment.confidence for segment in answer.segments) for answer in answers])
        return Inference(answers[0].by, (Tensor("text", "BYTES", text), Tensor("confidence", "FP64", confidence)))

    def _publish_rows(self, caller: Caller, rows: Rows, prediction: Prediction, decision: str) -> None:
        scores: Scores = prediction.output
        for row in range(rows.size):
            self._publish(
                _row_id(caller.request_id, row, rows.size),
                rows.entities[row] if rows.entities else None,
                prediction,
                {name: _or_none(column[row]) for name, column in scores.features.items()},
                {name: _iso(column[row]) for name, column in scores.event_times_s.items()},
                {"probability": float(scores.probability[row]), decision: bool(scores.decision[row])},
            )

    def _publish(
        self,
        request_id: str,
        entity: str | None,
        prediction: Prediction,
        features: Mapping[str, float | None],
        features_at: Mapping[str, str | None],
        output: Mapping[str, object],
    ) -> None:
        if self._log is None:
            return
        self._log.publish(
            {
                "id": request_id,
                "time": datetime.now(UTC).isoformat(),
                "model": prediction.model,
                "version": prediction.version,
                "variant": prediction.variant,
                "entity": entity,
                "latency_ms": prediction.latency_s * 1e3,
                "features": features,
                "features_at": features_at,
                "output": output,
            }
        )

    def close(self) -> None:
        """Stop following the registry, answer what is queued, send what waits for the broker."""
        if self._watcher is not None:
            self._watcher.close()
        self._server.close()
        if self._log is not None:
            self._log.close()


def _decode(data: bytes, rate_hz: int, max_audio_s: float, longest: int) -> tuple[Wave, list[int]]:
    """The samples of a file, and where to cut them into pieces of at most `longest`."""
    from models.whisper.audio import AudioError, decode, quiet_cuts

    try:
        wave = decode(data, rate_hz, max_seconds=max_audio_s)
    except AudioError as error:
        raise bad_request(str(error), "file", "invalid_audio") from None
    return wave, quiet_cuts(wave, rate_hz, longest)


def _by(prediction: Prediction) -> Answered:
    return Answered(prediction.model, prediction.version, prediction.variant)


def _row_id(request_id: str, row: int, rows: int) -> str:
    return request_id if rows == 1 else f"{request_id}/{row}"


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _iso(seconds: float) -> str | None:
    return None if np.isnan(seconds) else datetime.fromtimestamp(seconds, UTC).isoformat()
