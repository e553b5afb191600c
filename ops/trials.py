"""The trainings of a comparison: side by side, searched for with Ray Tune, and none done twice.

What they register is named `<registered name>-experiments`, so that no comparison touches a model that is served.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from mlflow import MlflowClient
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models import tasks
from models.registry import Registry
from ops.configuration import load
from ops.environment import Environment
from ops.experiments import Outcome, Row

TRAIN_LOSS = "train_loss"
SEARCH_SEED = 0
SPACES = {"choice": None, "uniform": 2, "loguniform": 2, "randint": 2}
SUFFIX = "-experiments"


class SearchConfig(BaseModel):
    """A search space: `space` maps dotted keys of a configuration to one of Ray Tune's distributions.

    For example `train.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}` or `network.width: {choice: [16, 32]}`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int = Field(8, ge=1)
    """How many points are tried; the best by the validation's primary metric is then trained with all seeds."""
    space: dict[str, dict[str, list[Any]]]

    @model_validator(mode="after")
    def _known(self) -> "SearchConfig":
        for key, spaces in self.space.items():
            known = [name in SPACES and len(values) == (SPACES[name] or len(values)) for name, values in spaces.items()]
            if known != [True]:
                raise ValueError(f"{key} must be one of choice: [...], uniform, loguniform or randint: [low, high]")
        return self


class Finished:
    """What was trained of a comparison that is under way, so that one that was interrupted repeats none of it.

    Args:
        folder: holds a file for each training; removed by `forget`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def remember(self, outcome: Outcome, config: str) -> None:
        """Keep the outcome of a training and what it was configured with."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(outcome.experiment, outcome.seed)
        scratch = path.with_suffix(".writing")
        scratch.write_text(json.dumps({"config": config, "outcome": asdict(outcome)}, default=str))
        scratch.replace(path)

    def recall(self, experiment: str, seed: int, config: str) -> Outcome | None:
        """The outcome of a training, None where there is none with this configuration."""
        try:
            found = json.loads(self._path(experiment, seed).read_text())
        except FileNotFoundError:
            return None
        return Outcome(**found["outcome"]) if found["config"] == config else None

    def forget(self) -> None:
        """The comparison is whole: the same command trains anew."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, experiment: str, seed: int) -> Path:
        return self._folder / f"{experiment}-{seed}.json"


class Trial:
    """One training, as a Ray task does it; calling it never raises what the training raises."""

    def __init__(
        self, task: str, environment: Environment, curve: str, higher_is_better: bool, name: str, finished: Finished
    ) -> None:
        self._task, self._environment, self._curve, self._name = task, environment, curve, name
        self._finished = finished
        self.higher_is_better = higher_is_better

    def __call__(self, path: Path, seed: int, overrides: Sequence[str], suffix: str = "") -> Outcome:
        """Train a configuration file with a seed and overrides, unless the comparison that goes on here has done it."""
        self._environment.export()
        experiment = f"{path.stem}{suffix}"
        own = [*overrides, f"train.seed={seed}", f"train.name={self._name}-{experiment}-{seed}"]
        try:
            config: Any = load(tasks.named(self._task).config, path, own)
        except ValueError as error:
            return Outcome(experiment, seed, None, error=str(error))
        recipe = f"{config.model_dump_json()} {self._environment.data}"
        if (known := self._finished.recall(experiment, seed, recipe)) is not None:
            return known
        config = config.model_copy(update={"registered_name": f"{config.registered_name}{SUFFIX}"})
        outcome = self._train(config, experiment, seed)
        if outcome.score is not None:
            self._finished.remember(outcome, recipe)
        return outcome

    def _train(self, config: Any, experiment: str, seed: int) -> Outcome:
        kind = tasks.named(self._task)
        try:
            found = kind.data(config, self._environment.data, self._environment.home)
            home, uri = self._environment.home, self._environment.tracking_uri
            result = dict(kind.train(config, found, home=home, tracking_uri=uri))
        except Exception as error:
            return Outcome(experiment, seed, None, error=f"{type(error).__name__}: {error}"[:1000])
        curves = {name: self._history(str(result["run_id"]), name) for name in (self._curve, TRAIN_LOSS)}
        best = max if self.higher_is_better else min
        return Outcome(experiment, seed, best(value for _, value in curves[self._curve]), result, curves)

    def _history(self, run_id: str, name: str) -> list[tuple[int, float]]:
        history = MlflowClient(self._environment.tracking_uri).get_metric_history(run_id, name)
        return sorted((point.step, point.value) for point in history)


def room_for(trains: Sequence[Any]) -> int:
    """How many trainings run side by side: as many as their workers find CPUs for, and GPUs where there are some."""
    resources: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    workers = max(train.most_workers for train in trains)
    cpus = max(train.most_workers * train.cpus_per_worker for train in trains)
    room = resources["CPU"] / cpus
    if resources.get("GPU", 0) >= workers:
        room = min(room, resources["GPU"] / workers)
    return max(1, int(room))


def train_all(
    trial: Trial, jobs: Sequence[tuple[Path, int]], overrides: Mapping[str, Sequence[str]], room: int
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


def _call(trial: Trial, path: Path, seed: int, overrides: Sequence[str]) -> Outcome:
    return trial(path, seed, overrides)


def search(trial: Trial, path: Path, overrides: Sequence[str], config: SearchConfig, room: int) -> list[str]:
    """The overrides of the best point of a search space that Ray Tune finds for a configuration with the first seed."""
    from ray import tune
    from ray.tune.search import BasicVariantGenerator

    def attempt(point: dict[str, Any]) -> None:
        chosen = [f"{key}={value}" for key, value in point.items()]
        suffix = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:8]
        outcome = trial(path, 0, [*overrides, *chosen], f"-{suffix}")
        if outcome.score is None:
            raise RuntimeError(outcome.error)
        tune.report({"score": outcome.score})

    space = {
        key: tune.choice(values) if name == "choice" else getattr(tune, name)(*values)
        for key, spaces in config.space.items()
        for name, values in spaces.items()
    }
    results = tune.Tuner(
        tune.with_resources(attempt, {"cpu": 0.01}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max" if trial.higher_is_better else "min",
            num_samples=config.samples,
            search_alg=BasicVariantGenerator(random_state=SEARCH_SEED, max_concurrent=room),
        ),
        run_config=tune.RunConfig(storage_path=str(Environment.read().home / "tune"), name=path.stem),
    ).fit()
    point = results.get_best_result().config or {}
    return [*overrides, *(f"{key}={value}" for key, value in point.items())]


def crown(
    registry: Registry, comparison: str, higher_is_better: bool, rows: Sequence[Row], outcomes: Sequence[Outcome]
) -> str:
    """Make the best training of the best configuration the champion among the experiments; `name version N`."""
    sign = 1 if higher_is_better else -1
    row = max((row for row in rows if row.mean is not None), key=lambda row: sign * float(row.mean or 0.0))
    scored = [outcome for outcome in outcomes if outcome.experiment == row.experiment and outcome.score is not None]
    best = max(scored, key=lambda outcome: sign * float(outcome.score or 0.0))
    name, version = str(best.result["model"]), int(best.result["version"])
    registry.promote(
        name, version, f"{row.experiment} is the best of {comparison}: {row.mean:.4f} over {row.seeds} seeds"
    )
    return f"{name} version {version}"
