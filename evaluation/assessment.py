"""Scores systems on a split: intervals, differences to the baseline and slices, all that a report shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation import statistics
from evaluation.batch import BatchError, Split, System
from evaluation.metrics.metric import Metric, Statistics
from evaluation.statistics import Difference, Interval, Resampling

SMALLEST_SLICE = 30  # below, an interval says nothing that a reader should act on


@dataclass(frozen=True)
class Scored:
    """One score with its interval."""

    score: float
    interval: Interval


Scores = Mapping[str, Mapping[str, Scored]]  # system -> metric -> score


@dataclass(frozen=True)
class Slice:
    """A part of the split; `scores` is empty where n is below `SMALLEST_SLICE`."""

    dimension: str
    label: str
    n: int
    scores: Scores


@dataclass(frozen=True)
class Assessment:
    """Everything known about the systems; `statistics` alone is enough to compute the rest again.

    Attributes:
        units: number of independent units that were resampled.
        statistics: system -> metric -> [N, K].
        differences: system -> metric -> difference to the baseline; empty without a baseline.
    """

    split: Split
    systems: Sequence[System]
    metrics: Sequence[Metric]
    baseline: str | None
    resampling: Resampling
    units: int
    statistics: Mapping[str, Mapping[str, Statistics]]
    scores: Scores
    differences: Mapping[str, Mapping[str, Difference]]
    slices: Sequence[Slice]


@dataclass(frozen=True)
class Evaluation:
    """An assessment with what the report must say about how it came about.

    Attributes:
        name: what was evaluated: the registered name, or `files`.
        notes: sentences for the reader.
        counts: what was missing or left out, by name.
    """

    name: str
    assessment: Assessment
    notes: Sequence[str]
    counts: Mapping[str, int]


def assess(
    split: Split,
    systems: Sequence[System],
    metrics: Sequence[Metric],
    baseline: str | None = None,
    resampling: Resampling | None = None,
) -> Assessment:
    """Score every system under every metric; `baseline` names the system that the others are compared with.

    Raises:
        BatchError: a system did not answer every sample, or the baseline is none of the systems.
        MetricError: a metric cannot judge these values.
    """
    resampling = resampling or Resampling()
    for system in systems:
        if len(system.predictions) != len(split.ids):
            answered = len(system.predictions)
            raise BatchError(f"{system.name}: {answered} predictions for {len(split.ids)} samples; give one for each.")
    if baseline is not None and baseline not in {system.name for system in systems}:
        raise BatchError(f"The baseline {baseline!r} is none of the systems {', '.join(s.name for s in systems)}.")
    units = statistics.units_of(split.groups, len(split.ids))
    rows = {
        system.name: {each.name: each.statistics(system.predictions, split.references) for each in metrics}
        for system in systems
    }
    compared = [system.name for system in systems if baseline is not None and system.name != baseline]
    differences = {
        name: {
            each.name: statistics.difference(each, rows[name][each.name], rows[baseline][each.name], units, resampling)
            for each in metrics
        }
        for name in compared
        if baseline is not None
    }
    return Assessment(
        split=split,
        systems=systems,
        metrics=metrics,
        baseline=baseline,
        resampling=resampling,
        units=int(units.max()) + 1,
        statistics=rows,
        scores=_scores(metrics, rows, units, resampling),
        differences=differences,
        slices=_slices(split, metrics, rows, units, resampling),
    )


def summary(assessment: Assessment) -> dict[str, dict[str, float]]:
    """Return system -> `wer`, `wer_low`, `wer_high`, ..., and as `difference` those of the first system with `wer_p`.

    Without a baseline there is no `difference`. A number that does not exist is NaN.
    """
    flat: dict[str, dict[str, float]] = {}
    for system in assessment.systems:
        flat[system.name] = {}
        for name, found in assessment.scores[system.name].items():
            ends = {f"{name}_low": found.interval.low, f"{name}_high": found.interval.high}
            flat[system.name] |= {name: found.score, **ends}
    first = assessment.systems[0].name
    if first in assessment.differences:
        flat["difference"] = {}
        for name, change in assessment.differences[first].items():
            ends = {f"{name}_low": change.interval.low, f"{name}_high": change.interval.high}
            flat["difference"] |= {name: change.value, **ends, f"{name}_p": change.p}
    return flat


def _scores(
    metrics: Sequence[Metric],
    rows: Mapping[str, Mapping[str, Statistics]],
    units: statistics.Units,
    resampling: Resampling,
) -> Scores:
    return {
        system: {
            each.name: Scored(
                score=statistics.score(each, by_metric[each.name]),
                interval=statistics.interval(each, by_metric[each.name], units, resampling),
            )
            for each in metrics
        }
        for system, by_metric in rows.items()
    }


def _slices(
    split: Split,
    metrics: Sequence[Metric],
    rows: Mapping[str, Mapping[str, Statistics]],
    units: statistics.Units,
    resampling: Resampling,
) -> list[Slice]:
    found = []
    for dimension, labels in split.slices.items():
        column = np.array(labels, dtype=np.str_)
        for label in sorted(set(labels)):
            inside = column == label
            n = int(inside.sum())
            if n < SMALLEST_SLICE:
                found.append(Slice(dimension, label, n, {}))
                continue
            part = {
                system: {name: values[inside] for name, values in by_metric.items()}
                for system, by_metric in rows.items()
            }
            inner = np.unique(units[inside], return_inverse=True)[1].astype(np.int64)
            found.append(Slice(dimension, label, n, _scores(metrics, part, inner, resampling)))
    return found
