"""Word and character error rate of a corpus: edit errors over the length of the references."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from evaluation.metrics.metric import MetricError, Statistics


@dataclass(frozen=True)
class ErrorRate:
    """Sum of edit errors over sum of reference tokens, as jiwer has it (not the mean of the samples' rates).

    Case and punctuation count. A sample with an empty reference adds its insertions. A corpus without a
    single reference token scores its number of insertions. The score may exceed 1.
    """

    name: str
    signature: str
    tokens: Callable[[str], Sequence[str]]
    columns: tuple[str, ...]
    higher_is_better: bool = False
    limits: tuple[float, float] = (0.0, inf)

    def statistics(self, predictions: Sequence[object], references: Sequence[object]) -> Statistics:
        """Return errors and reference tokens of each sample; both add up over any split of a corpus."""
        hypotheses, truths = self._tokenised(predictions, "prediction"), self._tokenised(references, "reference")
        errors = process.cpdist(truths, hypotheses, scorer=Levenshtein.distance, dtype=np.int64)
        lengths = np.fromiter(map(len, truths), np.int64, len(truths))
        return np.column_stack([errors, lengths])

    def scores(self, statistics: Statistics, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the rates of the weighted samples."""
        sums = weights @ statistics
        rates: NDArray[np.float64] = sums[:, 0] / np.maximum(sums[:, 1], 1.0)
        return rates

    def losses(self, statistics: Statistics) -> NDArray[np.float64]:
        """Return the number of errors of each sample."""
        return statistics[:, 0].astype(np.float64)

    def trials(self, statistics: Statistics, units: NDArray[np.int64]) -> int:
        """Return the number of units: every one has errors or could have had."""
        return len(np.unique(units))

    def _tokenised(self, texts: Sequence[object], what: str) -> list[Sequence[str]]:
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                kind = type(text).__name__
                raise MetricError(
                    f"{self.name} compares texts, but {what} {index + 1} is of type {kind}: give a string."
                )
        return [self.tokens(str(text)) for text in texts]


WER = ErrorRate(
    name="wer",
    signature="wer|case:mixed|punct:kept|tok:whitespace|empty:insertions|version:1",
    tokens=str.split,
    columns=("word_errors", "words"),
)
CER = ErrorRate(
    name="cer",
    signature="cer|case:mixed|punct:kept|tok:codepoints,spaces,stripped|empty:insertions|version:1",
    tokens=str.strip,
    columns=("character_errors", "characters"),
)
