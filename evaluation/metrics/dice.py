"""The mean of images' Dice, with intervals over what is independent: images, patients, groups of near-duplicates."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.metric import MetricError, Statistics


class MeanDice:
    """Dice of boolean masks of the same shape, averaged over images; two empty masks score 1, one empty mask 0."""

    name = "dice"
    signature = "dice:mean-over-images,both-empty=1,one-empty=0"
    higher_is_better = True
    limits = (0.0, 1.0)
    columns = ("dice",)

    def statistics(self, predictions: Sequence[object], references: Sequence[object]) -> Statistics:
        """One Dice a row, float64[N, 1].

        Raises:
            MetricError: a value is no boolean array, or the two masks of an image differ in shape.
        """
        return np.array([[_dice(one, truth)] for one, truth in zip(predictions, references, strict=True)]).reshape(
            -1, 1
        )

    def scores(self, statistics: Statistics, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weighted means, [B]; NaN without a sample."""
        total = weights.sum(axis=1)
        means = weights @ statistics[:, 0].astype(np.float64) / np.where(total > 0, total, 1)
        return np.where(total > 0, means, np.nan)

    def losses(self, statistics: Statistics) -> NDArray[np.float64]:
        """1 - Dice."""
        return 1 - statistics[:, 0].astype(np.float64)

    def trials(self, statistics: Statistics, units: NDArray[np.int64]) -> int:
        """All units count."""
        return len(np.unique(units))


def _dice(prediction: object, truth: object) -> float:
    found, true = _mask(prediction), _mask(truth)
    if found.shape != true.shape:
        raise MetricError(f"Dice needs masks of the same shape, not {found.shape} and {true.shape}.")
    total = int(found.sum() + true.sum())
    return 2 * int((found & true).sum()) / total if total else 1.0


def _mask(value: object) -> NDArray[np.bool_]:
    if not isinstance(value, np.ndarray) or value.dtype != np.bool_:
        raise MetricError(f"Dice judges boolean arrays, not {type(value).__name__}.")
    return value
