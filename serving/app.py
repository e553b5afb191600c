"""The Ray Serve application: `Gateway` takes HTTP, `Models` runs the models; one hop lies between them.

`build` is what serve.yaml imports. It reads the addresses from the environment where `args` do not give them.
"""

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from serving.backend import Caller, Health, Inference, Metadata, ModelStatus, Transcription
from serving.errors import ServingError, deadline_passed
from serving.gateway import create_app
from serving.settings import Settings
from serving.tensors import Tensor

GRACE_S = 5.0


@serve.deployment(ray_actor_options={"num_cpus": 0.2}, max_ongoing_requests=2048)
class Models:
    """A replica of `serving.service.ModelService`."""

    def __init__(self, settings: Settings) -> None:
        from serving.service import ModelService  # the gateway's process has no use for MLflow

        self._service = ModelService(settings)

    async def ask(self, method: str, *args: Any) -> Any:
        """Call a method of `serving.backend.Backend`.

        A refusal comes back as a value: Ray would wrap the exception and log its traceback.
        """
        try:
            return await getattr(self._service, method)(*args)
        except ServingError as error:
            return error

    def check_health(self) -> None:
        """See `ModelService.check_health`."""
        self._service.check_health()

    async def __del__(self) -> None:
        """Serve calls this when the replica has drained."""
        await asyncio.to_thread(self._service.close)


class Remote:
    """The backend behind a deployment handle.

    Args:
        handle: of `Models`.
        timeout_s: what a caller waits; the models' own deadline strikes first.
    """

    def __init__(self, handle: DeploymentHandle[Any], timeout_s: float) -> None:
        self._handle = handle
        self._timeout_s = timeout_s

    async def _ask(self, method: str, *args: object) -> Any:
        try:
            answer = await asyncio.wait_for(self._handle.ask.remote(method, *args), self._timeout_s)
        except TimeoutError:
            raise deadline_passed(self._timeout_s) from None
        except BackPressureError:
            message = "too many requests are waiting; try again in a second"
            raise ServingError(429, message, "queue_full", retry_after_s=1.0) from None
        if isinstance(answer, ServingError):
            raise answer
        return answer

    async def models(self) -> tuple[ModelStatus, ...]:
        """Every registered model."""
        found: tuple[ModelStatus, ...] = await self._ask("models")
        return found

    async def health(self) -> Health:
        """State of the models' side."""
        health: Health = await self._ask("health")
        return health

    async def metrics(self) -> str:
        """Prometheus text."""
        text: str = await self._ask("metrics")
        return text

    async def metadata(self, model: str, version: int | None) -> Metadata:
        """Inputs and outputs of a model."""
        metadata: Metadata = await self._ask("metadata", model, version)
        return metadata

    async def load(self, model: str) -> None:
        """Look at the registry now."""
        await self._ask("load", model)

    async def transcribe(self, model: str, audio: bytes, caller: Caller) -> Transcription:
        """The words of an audio file."""
        transcription: Transcription = await self._ask("transcribe", model, audio, caller)
        return transcription

    async def infer(self, model: str, version: int | None, inputs: Sequence[Tensor], caller: Caller) -> Inference:
        """Output tensors for input tensors."""
        inference: Inference = await self._ask("infer", model, version, inputs, caller)
        return inference


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=512)
@serve.ingress()
class Gateway:
    """The FastAPI application of `serving.gateway`, made in the replica."""

    def __init__(self, models: DeploymentHandle[Any], settings: Settings) -> None:
        self._models = models
        self._settings = settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve after the constructor."""
        return create_app(Remote(self._models, self._settings.timeout_s + GRACE_S), self._settings)


def build(args: dict[str, Any]) -> serve.Application:
    """The application of serve.yaml; `args` are `serving.settings.Settings`.

    Raises:
        SettingsError: an argument is unknown or wrong.
    """
    settings = Settings.read(args, os.environ)
    application: serve.Application = Gateway.bind(Models.bind(settings), settings)  # type: ignore[attr-defined]
    return application
