"""The small public face: evaluate answers, compare models, write a report; the same code as the evaluation job."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation import batch
from evaluation.assessment import Assessment, assess
from evaluation.metrics.registry import metric
from evaluation.report import ReportPaths, write
from evaluation.statistics import Difference, Resampling


class ResultsError(ValueError):
    """Results that cannot be compared, in one sentence."""


@dataclass(frozen=True)
class EvaluationResult:
    """One metric's score of one model.

    `details` holds `model_name`, `signature`, `n`, `low`, `high` and `interval` (its method), and the `predictions`,
    `references` and `inputs` that the score was computed from.
    """

    metric_name: str
    score: float
    details: Mapping[str, Any]


Results = Mapping[str, EvaluationResult]  # metric -> result, of one model


def evaluate(
    model_name: str,
    predictions: Sequence[Any],
    references: Sequence[Any],
    inputs: Sequence[Any] | None = None,
    metrics: Sequence[str] = ("wer", "cer"),
    resampling: Resampling | None = None,
) -> dict[str, EvaluationResult]:
    """Score a model's predictions under each metric; the order of predictions and references is the same.

    Raises:
        MetricError: an unknown metric, or values that it cannot judge.
        BatchError: no samples, or another number of predictions than of references.
    """
    assessment = _assess({model_name: predictions}, references, metrics, None, resampling)
    found = assessment.scores[model_name]
    return {
        each.name: EvaluationResult(
            metric_name=each.name,
            score=found[each.name].score,
            details={
                "model_name": model_name,
                "signature": each.signature,
                "n": len(references),
                "low": found[each.name].interval.low,
                "high": found[each.name].interval.high,
                "interval": found[each.name].interval.method,
                "predictions": tuple(predictions),
                "references": tuple(references),
                "inputs": None if inputs is None else tuple(inputs),
            },
        )
        for each in assessment.metrics
    }


def compare_models(
    results: Sequence[Results], baseline: str | None = None, resampling: Resampling | None = None
) -> Mapping[str, Mapping[str, Difference]]:
    """Compare models on the same samples: model -> metric -> paired difference to the baseline (default: the first).

    Raises:
        ResultsError: fewer than two models, two of the same name, or other references or metrics.
    """
    if len(results) < 2:
        raise ResultsError(f"There are {len(results)} models to compare: give the results of two or more.")
    return _joined(results, baseline or _name(results[0]), resampling).differences


def generate_report(
    results: Sequence[Results],
    output: Path,
    title: str = "Evaluation",
    baseline: str | None = None,
    resampling: Resampling | None = None,
) -> ReportPaths:
    """Write JSON, Markdown, HTML and Parquet of one or more models' results into a folder.

    Raises:
        ResultsError: as `compare_models`.
    """
    return write(_joined(results, baseline, resampling), output, title)


def _joined(results: Sequence[Results], baseline: str | None, resampling: Resampling | None) -> Assessment:
    if not results or not all(results):
        raise ResultsError("There are no results: give what evaluate() returned.")
    first = next(iter(results[0].values())).details
    for one in results[1:]:
        details = next(iter(one.values())).details
        if details["references"] != first["references"] or set(one) != set(results[0]):
            raise ResultsError(f"{_name(one)} and {_name(results[0])} have other references or metrics: evaluate anew.")
    predictions = {_name(one): next(iter(one.values())).details["predictions"] for one in results}
    if len(predictions) < len(results):
        raise ResultsError("Two of the models have the same name: give each its own.")
    return _assess(predictions, first["references"], list(results[0]), baseline, resampling)


def _name(results: Results) -> str:
    return str(next(iter(results.values())).details["model_name"])


def _assess(
    predictions: Mapping[str, Sequence[Any]],
    references: Sequence[Any],
    metrics: Sequence[str],
    baseline: str | None,
    resampling: Resampling | None,
) -> Assessment:
    ids = [str(index) for index in range(1, len(references) + 1)]
    split = batch.Split("samples in memory", batch.content_hash(ids, references), ids, references)
    systems = [batch.System(name, "–", answers) for name, answers in predictions.items()]
    return assess(split, systems, [metric(name) for name in metrics], baseline, resampling)
