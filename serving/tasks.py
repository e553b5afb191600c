"""What a batch is for each kind of model: waves to texts, rows of features to probabilities."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from serving.errors import bad_request
from serving.features import FeatureReader, Floats
from serving.tensors import Tensor

Wave = npt.NDArray[np.float32]


class Transcript(Protocol):
    """What a speech model says about one wave."""

    @property
    def text(self) -> str:
        """The words."""

    @property
    def confidence(self) -> float:
        """Between 0 and 1."""


class SpeechPredictor(Protocol):
    """The face of `models.whisper.predict.WhisperPredictor`."""

    task: str
    sample_rate_hz: int
    max_seconds: float

    def transcribe(self, waves: Sequence[Wave]) -> list[Transcript]:
        """One batched call."""


class RowPredictor(Protocol):
    """The face of `models.tabular.predict.TabularPredictor`."""

    task: str
    feature_service: str
    features: tuple[str, ...]
    threshold: float

    def predict(self, rows: Mapping[str, Floats]) -> Floats:
        """Probabilities of rows; NaN is a missing value."""


@dataclass(frozen=True)
class Rows:
    """One request to a tabular model: N rows.

    Attributes:
        entities: one a row, or None where `values` gives every feature.
        values: features that the request states itself, float64[N]; they go before the store's.
        size: N.
    """

    entities: tuple[str, ...] | None
    values: Mapping[str, Floats]
    size: int


class Scores(NamedTuple):
    """The answer to `Rows`: float64[N] probabilities, bool[N] decisions, and the features that were used.

    `event_times_s` holds the time (seconds) of each feature that came from the store, NaN where it did not.
    """

    probability: Floats
    decision: npt.NDArray[np.bool_]
    features: dict[str, Floats]
    event_times_s: dict[str, Floats]


def read_rows(inputs: Sequence[Tensor], features: Sequence[str], entity: str | None) -> Rows:
    """The rows that input tensors mean: `entity` BYTES [N] and features by name, each [N] or [N, 1].

    Raises:
        ServingError: status 400: unknown or repeated input, text where a number is due, different N.
    """
    entities: tuple[str, ...] | None = None
    values: dict[str, Floats] = {}
    sizes: dict[str, int] = {}
    for tensor in inputs:
        if tensor.name != "entity" and tensor.name not in features:
            near = difflib.get_close_matches(tensor.name, ["entity", *features], 1)
            hint = f"did you mean {near[0]}?" if near else "see the model's metadata"
            raise bad_request(f"the input {tensor.name!r} is unknown; {hint}", tensor.name)
        if tensor.name in sizes or len(tensor.shape) > 2 or tensor.shape[1:] not in ((), (1,)):
            raise bad_request(f"the input {tensor.name!r} must come once, with the shape [N] or [N, 1]", tensor.name)
        if (tensor.datatype == "BYTES") != (tensor.name == "entity"):
            raise bad_request(f"the input {tensor.name!r} must not be {tensor.datatype}", tensor.name)
        sizes[tensor.name] = tensor.data.size
        if tensor.name == "entity":
            entities = tuple(_text(item) for item in tensor.data.ravel())
        else:
            values[tensor.name] = tensor.data.ravel().astype(np.float64)
    size = next(iter(sizes.values()), 1)
    if size == 0 or set(sizes.values()) - {size}:
        raise bad_request("all inputs must have the same number of rows, at least one", "inputs")
    if entities is None and entity is not None:
        entities = (entity,) * size
    return Rows(entities, values, size)


def _text(item: bytes) -> str:
    try:
        return item.decode()
    except UnicodeDecodeError:
        raise bad_request("the input 'entity' must be UTF-8", "entity") from None


class Speech:
    """Waves (float32, mono, at `sample_rate_hz`, at most `max_seconds`) to transcripts."""

    task = "whisper"

    def __init__(self, predictor: SpeechPredictor) -> None:
        self.sample_rate_hz = predictor.sample_rate_hz
        self.max_seconds = predictor.max_seconds
        self._predictor = predictor

    def size(self, wave: Wave) -> int:
        """Every wave counts one."""
        return 1

    def execute(self, waves: Sequence[Wave]) -> Sequence[Transcript | Exception]:
        """One call of the model."""
        return self._predictor.transcribe(waves)


class Tabular:
    """Rows to scores, with the features that a request does not state read from the store in one go a batch.

    Args:
        predictor: the model.
        reader: of the model's feature service; None for a model that reads none.
    """

    task = "tabular"

    def __init__(self, predictor: RowPredictor, reader: FeatureReader | None) -> None:
        self.features = predictor.features
        self._predictor = predictor
        self._reader = reader

    def size(self, rows: Rows) -> int:
        """Every row counts."""
        return rows.size

    def check(self, rows: Rows) -> None:
        """Refuse a request that no batch could answer.

        Raises:
            ServingError: status 400, an entity is needed and not given, or is of the wrong type.
        """
        unstated = [name for name in self.features if name not in rows.values]
        if rows.entities is None and unstated:
            raise bad_request(
                f"the model reads features of an entity ({unstated[0]} and others are not among the inputs): "
                "send the header x-entity-id, or an input `entity` of BYTES [N]",
                "x-entity-id",
                "missing_entity",
            )
        if self._reader is not None:
            for entity in rows.entities or ():
                self._reader.key(entity)

    def execute(self, requests: Sequence[Rows]) -> Sequence[Scores | Exception]:
        """One look-up and one call of the model for all rows of all requests."""
        total = sum(rows.size for rows in requests)
        values = {name: np.full(total, np.nan) for name in self.features}
        times = {name: np.full(total, np.nan) for name in self.features}
        self._look_up(requests, values, times)
        bounds = np.cumsum([0, *(rows.size for rows in requests)])
        for start, rows in zip(bounds, requests, strict=False):
            for name, stated in rows.values.items():
                values[name][start : start + rows.size] = stated
                times[name][start : start + rows.size] = np.nan
        probability = self._predictor.predict(values)
        decision = probability >= self._predictor.threshold

        def cut(columns: Mapping[str, Floats], part: slice) -> dict[str, Floats]:
            return {name: column[part] for name, column in columns.items()}

        parts = [slice(start, end) for start, end in zip(bounds, bounds[1:], strict=False)]
        return [Scores(probability[part], decision[part], cut(values, part), cut(times, part)) for part in parts]

    def _look_up(self, requests: Sequence[Rows], values: dict[str, Floats], times: dict[str, Floats]) -> None:
        needs = np.repeat([self._unstated(rows) for rows in requests], [rows.size for rows in requests])
        entities = [entity for rows in requests if self._unstated(rows) for entity in rows.entities or ()]
        if self._reader is None or not entities:
            return
        found = self._reader.read(entities)
        for name in self.features:
            values[name][needs] = found.values[name]
            times[name][needs] = found.event_times_s[name]

    def _unstated(self, rows: Rows) -> bool:
        return rows.entities is not None and not all(name in rows.values for name in self.features)


Task = Speech | Tabular
