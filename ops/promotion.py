"""Whether a candidate takes the champion's place: it must be better by enough, surely, and worse at nothing guarded.

Both are scored sample by sample on the same split, so that the bootstrap draws the two scores of a sample together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics import Resampling, difference, units_of

Sums = Sequence[tuple[float, float]]
"""A metric's (sum, count) of each sample; the metric of all samples is the sum of sums over the sum of counts."""


@dataclass(frozen=True)
class Ratio:
    """A metric that is a sum over a count, as `evaluation.statistics` takes one."""

    name: str
    higher_is_better: bool
    signature: str = ""
    columns: tuple[str, ...] = ("sum", "count")
    limits: tuple[float, float] = (0.0, float("inf"))

    def statistics(self, predictions: Sequence[object], references: Sequence[object]) -> NDArray[np.float64]:
        """The sums and counts, [N, 2]."""
        return np.column_stack([np.asarray(predictions, np.float64), np.asarray(references, np.float64)])

    def scores(self, statistics: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum over count under each row of weights."""
        sums = weights @ statistics
        rates: NDArray[np.float64] = sums[:, 0] / np.maximum(sums[:, 1], 1e-12)
        return rates

    def losses(self, statistics: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sums."""
        return statistics[:, 0]

    def trials(self, statistics: NDArray[np.float64], units: NDArray[np.int64]) -> int:
        """The number of units."""
        return len(np.unique(units))


@dataclass(frozen=True)
class Gate:
    """What a candidate must do.

    Attributes:
        metric: by which it must gain.
        higher_is_better: its direction.
        minimum_gain: how much at least, in the metric's unit.
        guards: metric -> how much worse than the champion the candidate may be there.
        resampling: of the paired interval, whose lower end must be above zero.
    """

    metric: str
    higher_is_better: bool
    minimum_gain: float = 0.0
    guards: Mapping[str, float] = field(default_factory=dict)
    resampling: Resampling = Resampling()


@dataclass(frozen=True)
class Decision:
    """Whether the candidate is promoted, and why, in one sentence; a gain above zero is an improvement."""

    promoted: bool
    reason: str
    gain: float
    low: float
    high: float


def decide(
    gate: Gate,
    candidate: Mapping[str, Sums],
    champion: Mapping[str, Sums],
    directions: Mapping[str, bool],
    units: Sequence[str],
) -> Decision:
    """Hold a candidate against the champion.

    Args:
        gate: what is asked.
        candidate: metric -> (sum, count) of each sample.
        champion: the same of the same samples in the same order.
        directions: of each metric, whether higher is better; that of `wer` holds for its part `wer/general` too.
        units: what each sample belongs to; those of one unit, such as a sentence in several noises, are drawn together.
    """
    sign = 1 if gate.higher_is_better else -1
    metric = Ratio(gate.metric, gate.higher_is_better)
    own, other = np.asarray(candidate[gate.metric], np.float64), np.asarray(champion[gate.metric], np.float64)
    found = difference(metric, own, other, units_of(units, len(own)), gate.resampling)
    ends = sorted((sign * found.interval.low, sign * found.interval.high))
    gain, low, high = sign * found.value, ends[0], ends[1]
    level = f"{gate.resampling.level:.0%}"
    figures = f"{gate.metric} {_rate(own):.4f} against {_rate(other):.4f}"
    figures += f", a gain of {gain:.4f} ({level}: {low:.4f} to {high:.4f})"
    if not gain >= gate.minimum_gain:
        return Decision(False, f"{figures}: less than {gate.minimum_gain:g}", gain, low, high)
    if not low > 0:
        return Decision(False, f"{figures}: it may be chance", gain, low, high)
    for name, allowed in gate.guards.items():
        new, old = _rate(np.asarray(candidate[name])), _rate(np.asarray(champion[name]))
        worse = (old - new) if directions[name.partition("/")[0]] else (new - old)
        if worse > allowed:
            but = f"but {name} {new:.4f} against {old:.4f}: worse by more than {allowed:g}"
            return Decision(False, f"{figures}, {but}", gain, low, high)
    return Decision(True, figures, gain, low, high)


def _rate(sums: NDArray[np.float64]) -> float:
    return float(sums[:, 0].sum() / sums[:, 1].sum())
