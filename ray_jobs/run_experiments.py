"""Train several configurations with several seeds, side by side, and compare: `run_experiments.py A.yaml B.yaml`.

A comparison that was interrupted, or of which a training failed, goes on: what it has trained is not trained again,
and what was under way goes on at its last checkpoint.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from mlflow import MlflowClient

from models import tasks
from ops.configuration import load
from ops.environment import Environment
from ops.experiments import Finished, Outcome, SearchConfig, compare, write
from ops.jobs import JobError, ray_session, run

TRAIN_LOSS = "train_loss"


def main() -> dict[str, object]:
    """Search where a search space is given, train every configuration with every seed, write the comparison."""
    arguments = _arguments()
    environment = Environment.read()
    environment.export()
    task, paths = _task(arguments.configs)
    kind = tasks.named(task)
    search = load(SearchConfig, arguments.search) if arguments.search else None
    configs: dict[str, Any] = {path.stem: load(kind.config, path, arguments.overrides) for path in paths}
    first = next(iter(configs.values()))
    overrides: dict[str, Sequence[str]] = {path.stem: list(arguments.overrides) for path in paths}
    MlflowClient(environment.tracking_uri).search_experiments(max_results=1)  # makes the database before there are many
    folder = arguments.report or environment.home / "reports" / arguments.name
    finished = Finished(folder / "finished")
    with ray_session():
        found = kind.task(first, kind.data(first, environment.data, environment.home))
        trial = _Trial(task, environment, f"validation_{found.primary}", found.higher_is_better, arguments.name)
        room = _room([config.train for config in configs.values()])
        if search is not None:
            for path in paths:
                overrides[path.stem] = [*arguments.overrides, *_best(trial, path, arguments, search, room)]
        recipes = {name: f"{config.model_dump_json()} {overrides[name]}" for name, config in configs.items()}
        jobs = [(path, seed) for path in paths for seed in range(arguments.seeds)]
        known = {job: finished.recall(job[0].stem, job[1], recipes[job[0].stem]) for job in jobs}
        for job, outcome in _train_all(trial, [job for job in jobs if known[job] is None], overrides, room):
            known[job] = outcome
            if outcome.score is not None:
                finished.remember(outcome, recipes[outcome.experiment])
    outcomes = [outcome for outcome in known.values() if outcome is not None]
    if all(outcome.score is None for outcome in outcomes):
        raise JobError(f"Every training failed; the first one: {outcomes[0].error}")
    rows = compare(outcomes, overrides, found.higher_is_better)
    report = write(folder, found.primary, rows, outcomes)
    failed = sum(outcome.error is not None for outcome in outcomes)
    if not failed:
        finished.forget()
    return {"experiments": {row.experiment: row.mean for row in rows}, "failed": failed, "report": report}


class _Trial:
    """One training, as a Ray task does it; calling it never raises what the training raises."""

    def __init__(self, task: str, environment: Environment, curve: str, higher_is_better: bool, name: str) -> None:
        self._task, self._environment, self._curve, self._name = task, environment, curve, name
        self.higher_is_better = higher_is_better

    def __call__(self, path: Path, seed: int, overrides: Sequence[str], suffix: str = "") -> Outcome:
        """Train a configuration file with a seed and overrides."""
        self._environment.export()
        kind = tasks.named(self._task)
        own = [*overrides, f"train.seed={seed}", f"train.name={self._name}-{path.stem}{suffix}-{seed}"]
        try:
            config = load(kind.config, path, own)
            found = kind.data(config, self._environment.data, self._environment.home)
            home, uri = self._environment.home, self._environment.tracking_uri
            result = dict(kind.train(config, found, home=home, tracking_uri=uri))
        except Exception as error:
            return Outcome(path.stem, seed, None, error=f"{type(error).__name__}: {error}"[:1000])
        curves = {name: self._history(str(result["run_id"]), name) for name in (self._curve, TRAIN_LOSS)}
        best = max if self.higher_is_better else min
        return Outcome(path.stem, seed, best(value for _, value in curves[self._curve]), result, curves)

    def _history(self, run_id: str, name: str) -> list[tuple[int, float]]:
        history = MlflowClient(self._environment.tracking_uri).get_metric_history(run_id, name)
        return sorted((point.step, point.value) for point in history)


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


def _room(trains: Sequence[Any]) -> int:
    """How many trainings run side by side: as many as their workers find CPUs for, and GPUs where there are some."""
    resources: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    workers = max(train.most_workers for train in trains)
    cpus = max(train.most_workers * train.cpus_per_worker for train in trains)
    room = resources["CPU"] / cpus
    if resources.get("GPU", 0) >= workers:
        room = min(room, resources["GPU"] / workers)
    return max(1, int(room))


def _train_all(
    trial: _Trial, jobs: Sequence[tuple[Path, int]], overrides: Mapping[str, Sequence[str]], room: int
) -> Iterator[tuple[tuple[Path, int], Outcome]]:
    """The outcomes of jobs as they come, as many at a time as there is room for."""
    remote: Any = ray.remote(num_cpus=0)(_call)
    waiting = list(jobs)
    running: dict[Any, tuple[Path, int]] = {}
    while waiting or running:
        while waiting and len(running) < room:
            path, seed = waiting.pop(0)
            running[remote.remote(trial, path, seed, overrides[path.stem])] = path, seed
        ready, _ = ray.wait(list(running), num_returns=1)
        yield running.pop(ready[0]), ray.get(ready[0])


def _call(trial: _Trial, path: Path, seed: int, overrides: Sequence[str]) -> Outcome:
    return trial(path, seed, overrides)


def _best(trial: _Trial, path: Path, arguments: argparse.Namespace, search: SearchConfig, room: int) -> list[str]:
    """The overrides of the best point that Ray Tune finds with the first seed."""
    from ray import tune

    def attempt(point: dict[str, Any]) -> None:
        chosen = [f"{key}={value}" for key, value in point.items()]
        suffix = f"-{tune.get_context().get_trial_id()}"
        outcome = trial(path, 0, [*arguments.overrides, *chosen], suffix)
        if outcome.score is None:
            raise RuntimeError(outcome.error)
        tune.report({"score": outcome.score})

    space = {
        key: tune.choice(values) if name == "choice" else getattr(tune, name)(*values)
        for key, spaces in search.space.items()
        for name, values in spaces.items()
    }
    results = tune.Tuner(
        tune.with_resources(attempt, {"cpu": 0.01}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max" if trial.higher_is_better else "min",
            num_samples=search.samples,
            max_concurrent_trials=room,
        ),
        run_config=tune.RunConfig(storage_path=str(Environment.read().home / "tune"), name=path.stem),
    ).fit()
    best = results.get_best_result()
    return [f"{key}={value}" for key, value in (best.config or {}).items()]


if __name__ == "__main__":
    run(main)
