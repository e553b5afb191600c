"""Runs predictors over a split: one code path for every model, from inputs to predictions in the split's order."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

Input = TypeVar("Input")
Output = TypeVar("Output")


class BatchError(ValueError):
    """A split or a predictor that can't be evaluated, in one sentence."""


@dataclass(frozen=True)
class Split:
    """N samples that every system is judged on.

    Attributes:
        name: what the samples are, for the report.
        hash: identifies ids and references; scores compare only where it is the same.
        groups: samples of one group (a user, a document) are resampled together; without, each sample is alone.
        slices: dimension -> the label of each sample, for scores of parts of the split.
    """

    name: str
    hash: str
    ids: Sequence[str]
    references: Sequence[Any]
    groups: Sequence[str] | None = None
    slices: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.ids:
            raise BatchError(f"{self.name}: there are no samples, so nothing can be evaluated.")
        columns = {"references": self.references, "groups": self.groups, **self.slices}
        for column, values in columns.items():
            if values is not None and len(values) != len(self.ids):
                raise BatchError(f"{self.name}: {len(values)} {column} for {len(self.ids)} samples; give one for each.")


@dataclass(frozen=True)
class System:
    """What one model answered to a split, in its order; `seconds` is the time that inference took, where known."""

    name: str
    version: str
    predictions: Sequence[Any]
    seconds: float | None = None


def batches(inputs: Sequence[Input], size: int) -> Iterator[Sequence[Input]]:
    """Cut inputs into batches of at most `size`, in order."""
    for start in range(0, len(inputs), size):
        yield inputs[start : start + size]


def run(
    name: str,
    version: str,
    predict: Callable[[Sequence[Input]], Sequence[Output]],
    inputs: Sequence[Input],
    batch_size: int,
) -> System:
    """Predict batch by batch.

    Raises:
        BatchError: the predictor answered a batch with fewer or more outputs than inputs.
    """
    started, outputs = time.perf_counter(), list[Output]()
    for batch in batches(inputs, batch_size):
        answered = predict(batch)
        if len(answered) != len(batch):
            raise BatchError(f"{name}: answered a batch of {len(batch)} with {len(answered)} outputs; one each is due.")
        outputs.extend(answered)
    return System(name, version, outputs, seconds=time.perf_counter() - started)


def content_hash(ids: Sequence[str], references: Sequence[Any]) -> str:
    """Return a short SHA-256 of ids and references in their order."""
    digest = hashlib.sha256()
    for pair in zip(ids, references, strict=True):
        digest.update(repr(pair).encode())
    return digest.hexdigest()[:16]
