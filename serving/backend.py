"""What the gateway and the models' side say to each other, in one process or across two."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from serving.tensors import Tensor


@dataclass(frozen=True)
class ModelStatus:
    """A model as its users see it; `variant` is its alias, `version` the one that answers (0: none yet)."""

    id: str
    name: str
    variant: str
    version: int
    task: str
    state: Literal["ready", "loading", "failed"]
    error: str = ""


@dataclass(frozen=True)
class Health:
    """State of the server; `degraded` means that a registered model could not be loaded and others answer."""

    status: Literal["ready", "loading", "degraded"]
    models: tuple[ModelStatus, ...]
    queue_size: int
    metrics: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Caller:
    """Who asks: the request's id, and the entity of `x-entity-id`."""

    request_id: str
    entity: str | None = None


@dataclass(frozen=True)
class Answered:
    """Who answered, for the response's headers."""

    model: str
    version: int
    variant: str


@dataclass(frozen=True)
class Segment:
    """A piece of a transcription, in seconds from the start."""

    start_s: float
    end_s: float
    text: str
    confidence: float


@dataclass(frozen=True)
class Transcription:
    """The words of one upload."""

    by: Answered
    segments: tuple[Segment, ...]
    duration_s: float

    @property
    def text(self) -> str:
        """All segments."""
        return " ".join(segment.text for segment in self.segments if segment.text)


@dataclass(frozen=True)
class Inference:
    """Output tensors, in the order of the model's metadata."""

    by: Answered
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class TensorSpec:
    """Name, datatype and shape of a tensor in a model's metadata; -1 is any size."""

    name: str
    datatype: str
    shape: tuple[int, ...] = (-1,)


@dataclass(frozen=True)
class Metadata:
    """What the Open Inference Protocol says about a model."""

    model: str
    version: int
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Backend(Protocol):
    """The models' side as the gateway sees it; every method may raise a `ServingError`."""

    async def models(self) -> tuple[ModelStatus, ...]:
        """Every registered model."""

    async def health(self) -> Health:
        """State of the models' side."""

    async def metrics(self) -> str:
        """Prometheus text."""

    async def metadata(self, model: str, version: int | None) -> Metadata:
        """Inputs and outputs of a model."""

    async def load(self, model: str) -> None:
        """Look at the registry now."""

    async def transcribe(self, model: str, audio: bytes, caller: Caller) -> Transcription:
        """The words of an audio file."""

    async def infer(self, model: str, version: int | None, inputs: Sequence[Tensor], caller: Caller) -> Inference:
        """Output tensors for input tensors."""


def answer_headers(by: Answered) -> dict[str, str]:
    """Response headers that say who answered."""
    return {"x-model-version": str(by.version), "x-variant": by.variant}
