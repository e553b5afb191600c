"""Logs an evaluation as an MLflow run, so that scores are followed over time."""

from collections.abc import Mapping
from dataclasses import asdict

from evaluation.assessment import Evaluation, summary
from evaluation.report import ReportPaths
from models import runs


def log(tracking_uri: str, evaluation: Evaluation, paths: ReportPaths, parameters: Mapping[str, object]) -> str:
    """Log scores, parameters and the report's files under the experiment of the evaluated name; return the run's id."""
    assessment = evaluation.assessment
    with runs.opened(tracking_uri, evaluation.name, f"evaluate {evaluation.name}") as run:
        versions = {f"evaluated.{system.name}": system.version for system in assessment.systems}
        signatures = {f"signature.{metric.name}": metric.signature for metric in assessment.metrics}
        resampling = {f"resampling.{key}": value for key, value in asdict(assessment.resampling).items()}
        data = {"data.hash": assessment.split.hash, "data.samples": len(assessment.split.ids)}
        run.log_params({**parameters, **versions, **signatures, **resampling, **data})
        scores = summary(assessment)
        run.log_metrics(
            {f"{system}_{name}": value for system, found in scores.items() for name, value in found.items()}
        )
        run.log_metrics(evaluation.counts)
        for path in asdict(paths).values():
            run.log_file(path, "report")
    return run.id
