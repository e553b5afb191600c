"""Area under the ROC curve: the chance that a positive sample scores above a negative one, ties counted half."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.metric import MetricError, Statistics


class AreaUnderROC:
    """Exact AUROC by weighted rank sums (Mann and Whitney), equal to scikit-learn's `roc_auc_score`.

    References are 0 or 1 (or booleans), predictions any finite numbers. A sample of one class has no score: NaN.
    """

    name = "auroc"
    signature = "auroc|ties:half|exact|version:1"
    higher_is_better = True
    limits = (0.0, 1.0)
    columns = ("score", "label")

    def statistics(self, predictions: Sequence[object], references: Sequence[object]) -> Statistics:
        """Return score and label of each sample."""
        rows = []
        for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            if not isinstance(prediction, (int, float, np.number)) or not np.isfinite(prediction):
                raise MetricError(f"auroc needs finite numbers, but prediction {index + 1} is {prediction!r}.")
            if not isinstance(reference, (int, float, np.number, np.bool_)) or reference not in (0, 1):
                raise MetricError(f"auroc needs labels 0 or 1, but reference {index + 1} is {reference!r}.")
            rows.append((float(prediction), float(reference)))
        return np.array(rows, dtype=np.float64).reshape(-1, 2)

    def scores(self, statistics: Statistics, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the areas under the weighted samples' curves."""
        if not len(statistics):
            return np.full(len(weights), np.nan)
        order = np.argsort(statistics[:, 0], kind="stable")
        score, label = statistics[order].T
        ties = np.flatnonzero(np.diff(score, prepend=-np.inf))
        ordered = weights[:, order]
        positive = np.add.reduceat(ordered * label, ties, axis=1)
        negative = np.add.reduceat(ordered * (1 - label), ties, axis=1)
        below = np.cumsum(negative, axis=1) - negative / 2
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        won = (positive * below).sum(axis=1)
        areas: NDArray[np.float64] = np.divide(won, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)
        return areas

    def losses(self, statistics: Statistics) -> NDArray[np.float64]:
        """Return the distance of each score from its label."""
        distances: NDArray[np.float64] = np.abs(statistics[:, 1] - statistics[:, 0])
        return distances

    def trials(self, statistics: Statistics, units: NDArray[np.int64]) -> int:
        """Return the number of units of the rarer class, which bounds the variance of an AUROC."""
        positive = statistics[:, 1] == 1
        return min(len(np.unique(units[positive])), len(np.unique(units[~positive])))
