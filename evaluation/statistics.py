"""How sure a score is: intervals, paired differences and tests, by resampling per-sample statistics.

Nothing here runs a model again: a resample is a row of weights over the samples, and a corpus metric's score is a
function of `weights @ statistics`. The unit of resampling is the sample, or the group that samples share (a user, a
document), since samples of one group are not independent.

Intervals are BCa (Efron 1987) and not plain percentiles: utterances that are mostly right, with a few bad ones, give
a skewed rate, and there the percentile interval of 95% covers 88 to 90%, the BCa one 93 to 98% (n = 100, 2 to 5% of
the utterances wrong; tests/unit/test_statistics.py repeats one case). Where every resample scores the same (no error at
all, or nothing right) any bootstrap claims certainty; `degenerate_margin` says what is known then.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import nan, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from evaluation.metrics.metric import Metric, Statistics

BLOCK_ELEMENTS = 2_000_000  # weights held at once, so that memory stays below some 50 MB
JACKKNIFE_BLOCKS = 500  # deleting blocks of units estimates the same acceleration as deleting single ones

Floats = NDArray[np.float64]
Units = NDArray[np.int64]
Scores = Callable[[Floats], Floats]  # weights over samples [B, N] -> scores [B]


@dataclass(frozen=True)
class Resampling:
    """How to resample; the same seed gives the same resamples for every system, metric and difference."""

    replicates: int = 1000
    seed: int = 0
    level: float = 0.95


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval; both ends are NaN where the method is `undetermined`."""

    low: float
    high: float
    method: str  # "bca", "degenerate" or "undetermined"


@dataclass(frozen=True)
class Difference:
    """First system minus second on the same samples, with p of the hypothesis that the two are exchangeable."""

    value: float
    interval: Interval
    p: float


def wilson(successes: float, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's (1927) score interval of a proportion; (0, 1) without a trial."""
    if trials == 0:
        return 0.0, 1.0
    z2 = float(ndtri((1 + level) / 2)) ** 2
    rate = successes / trials
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = sqrt(z2 * (rate * (1 - rate) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def degenerate_margin(trials: int, level: float = 0.95) -> float:
    """Return how far the truth may lie from a score that no resample moves.

    None of the units departs from the others, so by Wilson's upper limit of 0 of `trials` at most this share of all
    units does, each of which is taken to move the score by no more than its own share.
    """
    return wilson(0, trials, level)[1]


def units_of(groups: Sequence[str] | None, samples: int) -> Units:
    """Return the unit of each sample as 0..G-1: its group, or the sample itself."""
    if groups is None:
        return np.arange(samples)
    return np.unique(np.array(groups, dtype=np.str_), return_inverse=True)[1].astype(np.int64)


def score(metric: Metric, statistics: Statistics) -> float:
    """Return the score of all samples; NaN where the metric has none."""
    return float(metric.scores(statistics, np.ones((1, len(statistics))))[0])


def interval(metric: Metric, statistics: Statistics, units: Units, resampling: Resampling) -> Interval:
    """Return the interval of one system's score."""
    return _interval(
        lambda weights: metric.scores(statistics, weights),
        units,
        resampling,
        metric.trials(statistics, units),
        metric.limits,
    )


def difference(
    metric: Metric, first: Statistics, second: Statistics, units: Units, resampling: Resampling
) -> Difference:
    """Compare two systems on the same samples; both rows of a sample are drawn together."""
    low, high = metric.limits
    trials = min(metric.trials(first, units), metric.trials(second, units))
    return Difference(
        value=score(metric, first) - score(metric, second),
        interval=_interval(
            lambda weights: metric.scores(first, weights) - metric.scores(second, weights),
            units,
            resampling,
            trials,
            (low - high, high - low),
        ),
        p=randomisation_p(metric, first, second, units, resampling),
    )


def randomisation_p(
    metric: Metric, first: Statistics, second: Statistics, units: Units, resampling: Resampling
) -> float:
    """Return the two-sided p of approximate randomisation (Noreen 1989): systems swap outputs, unit by unit.

    Never 0: the observed assignment counts as one of the trials.
    """
    both = np.concatenate([first, second])
    observed = abs(score(metric, first) - score(metric, second))
    if not np.isfinite(observed):
        return nan
    rng = np.random.default_rng(resampling.seed)
    count, extreme = int(units.max()) + 1, 0
    for size in _blocks(resampling.replicates, 2 * len(units)):
        swapped = rng.integers(0, 2, (size, count))[:, units].astype(np.float64)
        there = metric.scores(both, np.hstack([1 - swapped, swapped]))
        back = metric.scores(both, np.hstack([swapped, 1 - swapped]))
        extreme += int(np.count_nonzero(np.abs(there - back) >= observed - 1e-12))
    return (extreme + 1) / (resampling.replicates + 1)


def _interval(
    scores: Scores, units: Units, resampling: Resampling, trials: int, limits: tuple[float, float]
) -> Interval:
    estimate = float(scores(np.ones((1, len(units))))[0])
    drawn = np.concatenate([scores(weights) for weights in _resamples(units, resampling)])
    drawn = np.sort(drawn[np.isfinite(drawn)])
    if not np.isfinite(estimate) or len(drawn) < resampling.replicates / 2:
        return Interval(nan, nan, "undetermined")
    if drawn[-1] - drawn[0] < 1e-12:
        margin = degenerate_margin(trials, resampling.level)
        return Interval(max(limits[0], estimate - margin), min(limits[1], estimate + margin), "degenerate")
    low, high = _bca(drawn, estimate, _jackknife(scores, units), resampling.level)
    return Interval(low, high, "bca")


def _bca(drawn: Floats, estimate: float, jackknife: Floats, level: float) -> tuple[float, float]:
    """Return the bias-corrected and accelerated quantiles of sorted replicates; ties with the estimate count half."""
    below = np.searchsorted(drawn, estimate - 1e-12), np.searchsorted(drawn, estimate + 1e-12)
    share = np.clip((below[0] + below[1]) / (2 * len(drawn)), 1 / len(drawn), 1 - 1 / len(drawn))
    bias = ndtri(share)
    influence = jackknife.mean() - jackknife
    spread = float((influence**2).sum()) ** 1.5
    acceleration = float((influence**3).sum()) / (6 * spread) if spread > 0 else 0.0
    shifted = bias + ndtri([(1 - level) / 2, (1 + level) / 2])
    # The correction has a pole at acceleration * shifted = 1, beyond which it would turn the interval round.
    low, high = np.quantile(drawn, ndtr(bias + shifted / np.maximum(1 - acceleration * shifted, 0.1)))
    return float(low), float(high)


def _jackknife(scores: Scores, units: Units) -> Floats:
    count = min(int(units.max()) + 1, JACKKNIFE_BLOCKS)
    block = units % count
    left_out, values = 0, []
    for size in _blocks(count, len(units)):
        deleted = np.arange(left_out, left_out + size)
        values.append(scores((block != deleted[:, None]).astype(np.float64)))
        left_out += size
    found = np.concatenate(values)
    return found[np.isfinite(found)]


def _resamples(units: Units, resampling: Resampling) -> Iterator[Floats]:
    """Yield multinomial weights, [b, N]: how often each sample's unit was drawn when G units are drawn from G."""
    rng = np.random.default_rng(resampling.seed)
    count = int(units.max()) + 1
    for size in _blocks(resampling.replicates, len(units)):
        drawn = rng.integers(0, count, (size, count)) + np.arange(size)[:, None] * count
        weights = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        yield weights[:, units].astype(np.float64)


def _blocks(rows: int, columns: int) -> Iterator[int]:
    size = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, rows, size):
        yield min(size, rows - start)
