"""What a metric is: per-sample statistics, and the score of a weighted sample of them."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Statistics = NDArray[Any]  # [N, K], int64 or float64


class MetricError(ValueError):
    """An unknown metric, or values that a metric cannot judge; the message is one sentence."""


class Metric(Protocol):
    """A metric over N samples; one is registered by name through the entry point group `millrace.metrics`.

    Two scores compare only under the same signature.
    """

    @property
    def name(self) -> str:
        """Short name, as users type it."""
        ...

    @property
    def signature(self) -> str:
        """Every choice that changes the score."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """The direction."""
        ...

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest possible score."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the K statistics of a sample."""
        ...

    def statistics(self, predictions: Sequence[Any], references: Sequence[Any]) -> Statistics:
        """Return the statistics, [N, K], one row a sample in the order given; counts are int64 and add up.

        Raises:
            MetricError: a value of a type that the metric cannot judge.
        """
        ...

    def scores(self, statistics: Statistics, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return B scores of the sample [N, K] under each row of weights [B, N] (0 = left out, 2 = counted twice).

        NaN where a weighted sample has no score.
        """
        ...

    def losses(self, statistics: Statistics) -> NDArray[np.float64]:
        """Return how badly each sample did, [N]; the largest are shown as the worst examples."""
        ...

    def trials(self, statistics: Statistics, units: NDArray[np.int64]) -> int:
        """Return the number of independent units (of `units`, [N]) that the score rests on."""
        ...
