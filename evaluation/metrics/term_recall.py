"""How many of a domain's terms that were said are heard."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.metric import MetricError, Statistics
from models.whisper.sentences import terms_in


@dataclass(frozen=True)
class TermRecall:
    """Share of the terms of the references that the transcripts have too, as whole words and as often.

    A term is a word or a phrase; of overlapping ones the longest counts. A sample without a term doesn't count.
    """

    terms: tuple[str, ...]

    name = "term_recall"
    higher_is_better = True
    limits = (0.0, 1.0)
    columns = ("heard", "said")

    @property
    def signature(self) -> str:
        """Every choice that changes the score."""
        return f"term_recall|case:mixed|whole words|terms:{len(self.terms)}|version:1"

    def statistics(self, predictions: Sequence[object], references: Sequence[object]) -> Statistics:
        """Return terms heard and terms said of each sample."""
        rows = []
        for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            if not isinstance(prediction, str) or not isinstance(reference, str):
                raise MetricError(f"term_recall compares texts, but sample {index + 1} has another type: give strings.")
            said = Counter(terms_in(reference, self.terms))
            heard = said & Counter(terms_in(prediction, self.terms))
            rows.append((heard.total(), said.total()))
        return np.array(rows, dtype=np.int64).reshape(-1, 2)

    def scores(self, statistics: Statistics, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the recalls of the weighted samples; NaN where no term is said."""
        heard, said = (weights @ statistics).T
        recalls: NDArray[np.float64] = np.divide(heard, said, out=np.full(len(weights), np.nan), where=said > 0)
        return recalls

    def losses(self, statistics: Statistics) -> NDArray[np.float64]:
        """Return the number of terms that each sample misses."""
        return (statistics[:, 1] - statistics[:, 0]).astype(np.float64)

    def trials(self, statistics: Statistics, units: NDArray[np.int64]) -> int:
        """Return the number of units in which a term is said."""
        return len(np.unique(units[statistics[:, 1] > 0]))
