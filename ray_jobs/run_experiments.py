"""Train several configurations with several seeds, side by side, and compare: `run_experiments.py A.yaml B.yaml`.

A comparison that was interrupted, or of which a training failed, goes on: what it has trained is not trained again,
and what was under way goes on at its last checkpoint.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from models import tasks
from models.registry import Registry
from ops.configuration import load
from ops.environment import Environment
from ops.experiments import compare, write
from ops.jobs import JobError, ray_session, run
from ops.trials import Finished, SearchConfig, Trial, best_of, room_for, search, train_all


def main() -> dict[str, object]:
    """Search where a search space is given, train every configuration with every seed, write the comparison."""
    arguments = _arguments()
    environment = Environment.read()
    environment.export()
    task, paths = _task(arguments.configs)
    kind = tasks.named(task)
    space = load(SearchConfig, arguments.search) if arguments.search else None
    configs: dict[str, Any] = {path.stem: load(kind.config, path, arguments.overrides) for path in paths}
    first = next(iter(configs.values()))
    overrides: dict[str, Sequence[str]] = {path.stem: list(arguments.overrides) for path in paths}
    MlflowClient(environment.tracking_uri).search_experiments(max_results=1)  # makes the database before there are many
    folder = (arguments.report or environment.home / "reports" / arguments.name).absolute()
    finished = Finished(folder / "finished")
    with ray_session():
        example = kind.task(first, kind.data(first, environment.data, environment.home))
        metric, higher_is_better = example.primary, example.higher_is_better
        trial = Trial(task, environment, f"validation_{metric}", higher_is_better, arguments.name, finished)
        room = room_for([config.train for config in configs.values()])
        if space is not None:
            overrides = {path.stem: search(trial, path, overrides[path.stem], space, room) for path in paths}
        jobs = [(path, seed) for path in paths for seed in range(arguments.seeds)]
        outcomes = train_all(trial, jobs, overrides, room)
    if all(outcome.score is None for outcome in outcomes):
        raise JobError(f"Every training failed; the first one: {outcomes[0].error}")
    rows = compare(outcomes, overrides, higher_is_better)
    report = write(folder, metric, rows, outcomes)
    failed = sum(outcome.error is not None for outcome in outcomes)
    if not failed:
        finished.forget()
    row, best = best_of(rows, outcomes, higher_is_better)
    name, version = str(best.result["model"]), int(best.result["version"])
    reason = f"{row.experiment} is the best of {arguments.name}: {row.mean:.4f} over {row.seeds} seeds"
    Registry(environment.tracking_uri).promote(name, version, reason)
    means = {row.experiment: row.mean for row in rows}
    return {"experiments": means, "failed": failed, "best": f"{name} version {version}", "report": report}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="+", type=Path, help="YAML files of one task; the first is compared with")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each configuration (default %(default)s)")
    parser.add_argument("--search", type=Path, help="YAML of a search space, tried on each configuration first")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a value in all"
    )
    parser.add_argument("--name", default="comparison", help="name of the comparison (default %(default)s)")
    parser.add_argument("--report", type=Path, help="where to write (default HOME/reports/NAME)")
    return parser.parse_args()


def _task(configs: Sequence[Path]) -> tuple[str, list[Path]]:
    paths = [path.absolute() for path in configs]
    names = {path.parent.name for path in paths}
    if len(names) > 1 or len({path.stem for path in paths}) < len(paths):
        raise JobError("The configurations must be of one task, each with a file name of its own.")
    return names.pop(), paths


if __name__ == "__main__":
    run(main)
