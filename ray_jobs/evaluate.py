"""Evaluates the champion and the baseline of a configuration, or anybody's predictions, and writes a report."""

import argparse
import math
from dataclasses import asdict
from pathlib import Path

import yaml

from evaluation import answers, report, tracking
from evaluation.assessment import Evaluation, summary
from models import runs
from ops.configuration import load
from ops.environment import Environment
from ops.jobs import REPOSITORY, JobError, parser, ray_session, run


def main() -> dict[str, object]:
    """Evaluate files where they are given, else what the configuration names; report, log, print the scores."""
    arguments = _arguments()
    environment = Environment.read()
    logged = True
    if arguments.predictions or arguments.references:
        evaluation, parameters = _files(arguments), {"predictions": arguments.predictions}
        logged = environment.mlflow_tracking_uri is not None
    else:
        environment.export()
        evaluate = _tabular if _is_tabular(arguments.config) else _speech
        evaluation, parameters = evaluate(arguments, environment)
    output = (arguments.output or environment.home / "reports" / evaluation.name).absolute()
    paths = report.write(evaluation.assessment, output, f"Evaluation of {evaluation.name}", evaluation.notes)
    result: dict[str, object] = {
        system: {name: value if math.isfinite(value) else None for name, value in scores.items()}
        for system, scores in summary(evaluation.assessment).items()
    }
    if logged:
        result["run_id"] = tracking.log(environment.tracking_uri, evaluation, paths, parameters)
    split = evaluation.assessment.split
    return {
        **result,
        **evaluation.counts,
        "samples": len(split.ids),
        "data_hash": split.hash,
        "report": {kind: str(path) for kind, path in asdict(paths).items()},
    }


def _arguments() -> argparse.Namespace:
    arguments = parser(__doc__ or "", config="configs/whisper/digits.yaml")
    arguments.add_argument("--repo", type=Path, default=REPOSITORY / "feature_repo", help="Feast repository")
    arguments.add_argument("--predictions", type=Path, help="JSON Lines of id and prediction, instead of --config")
    arguments.add_argument("--references", type=Path, help="JSON Lines of id and reference")
    arguments.add_argument("--metrics", default="wer,cer", help="for --predictions, comma-separated (%(default)s)")
    arguments.add_argument("--output", type=Path, help="folder of the report (default MILLRACE_HOME/reports/NAME)")
    return arguments.parse_args()


def _files(arguments: argparse.Namespace) -> Evaluation:
    if not (arguments.predictions and arguments.references):
        raise JobError("--predictions and --references belong together: give both files.")
    metrics = [name.strip() for name in arguments.metrics.split(",")]
    return answers.evaluate(arguments.predictions, arguments.references, metrics)


def _is_tabular(path: Path) -> bool:
    """Whether the data section names a label, as only a tabular configuration's does; `load` judges the rest."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    section = document.get("data") if isinstance(document, dict) else None
    return isinstance(section, dict) and "label" in section


def _speech(arguments: argparse.Namespace, environment: Environment) -> tuple[Evaluation, dict[str, object]]:
    from evaluation import speech
    from models.whisper.config import WhisperConfig

    config = load(WhisperConfig, arguments.config, arguments.overrides)
    with ray_session():
        evaluation = speech.evaluate(
            config, environment.data, arguments.repo, environment.tracking_uri, environment.home
        )
    return evaluation, runs.flatten(config.model_dump())


def _tabular(arguments: argparse.Namespace, environment: Environment) -> tuple[Evaluation, dict[str, object]]:
    from evaluation import edits
    from models.tabular.config import TabularConfig

    config = load(TabularConfig, arguments.config, arguments.overrides)
    kafka, cache = environment.kafka_bootstrap_servers, environment.home / "models"
    evaluation = edits.evaluate(config, kafka, arguments.repo, environment.tracking_uri, cache)
    return evaluation, runs.flatten(config.model_dump())


if __name__ == "__main__":
    run(main)
