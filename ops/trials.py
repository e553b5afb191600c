"""The trainings of a comparison: side by side, searched for with Ray Tune, and none done twice."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from mlflow import MlflowClient
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models import tasks
from models.registry import EXPERIMENTS
from ops.configuration import load
from ops.environment import Environment
from ops.experiments import Outcome, Row

logger = logging.getLogger(__name__)

TRAIN_LOSS = "train_loss"
SEARCH_SEED = 0
CHOICE, RANGES = "choice", ("uniform", "loguniform", "randint")


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
        for key, distribution in self.space.items():
            if len(distribution) != 1 or not all(_is_known(name, given) for name, given in distribution.items()):
                raise ValueError(f"{key} must be one of choice: [...], uniform, loguniform or randint: [low, high]")
        return self


def _is_known(name: str, given: list[Any]) -> bool:
    return (name == CHOICE and bool(given)) or (name in RANGES and len(given) == 2)


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
        self._task, self.environment, self._curve, self._name = task, environment, curve, name
        self._finished = finished
        self.higher_is_better = higher_is_better

    def __call__(self, path: Path, seed: int, overrides: Sequence[str], suffix: str = "") -> Outcome:
        """Train a configuration file with a seed and overrides, unless the comparison that goes on here has done it."""
        self.environment.export()
        experiment = f"{path.stem}{suffix}"
        own = [*overrides, f"train.seed={seed}", f"train.name={self._name}-{experiment}-{seed}"]
        try:
            config: Any = load(tasks.named(self._task).config, path, own)
        except ValueError as error:
            return Outcome(experiment, seed, None, error=str(error))
        recipe = f"{config.model_dump_json()} {self.environment.data}"
        if (known := self._finished.recall(experiment, seed, recipe)) is not None:
            return known
        config = config.model_copy(update={"registered_name": f"{config.registered_name}{EXPERIMENTS}"})
        outcome = self._train(config, experiment, seed)
        if outcome.score is not None:
            self._finished.remember(outcome, recipe)
        return outcome

    def _train(self, config: Any, experiment: str, seed: int) -> Outcome:
        kind = tasks.named(self._task)
        try:
            found = kind.data(config, self.environment.data, self.environment.home)
            home, uri = self.environment.home, self.environment.tracking_uri
            result = dict(kind.train(config, found, home=home, tracking_uri=uri))
            curves = {name: self._history(str(result["run_id"]), name) for name in (self._curve, TRAIN_LOSS)}
        except Exception as error:
            logger.exception(json.dumps({"event": "training failed", "experiment": experiment, "seed": seed}))
            return Outcome(experiment, seed, None, error=f"{type(error).__name__}: {error}"[:1000])
        values = [value for _, value in curves[self._curve]]
        if not values:
            return Outcome(experiment, seed, None, error=f"{self._curve} was never a finite number.")
        return Outcome(experiment, seed, (max if self.higher_is_better else min)(values), result, curves)

    def _history(self, run_id: str, name: str) -> list[tuple[int, float]]:
        history = MlflowClient(self.environment.tracking_uri).get_metric_history(run_id, name)
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
) -> list[Outcome]:
    """The outcomes of jobs, in their order; as many at a time as there is room for."""
    remote: Any = ray.remote(num_cpus=0)(_call)
    waiting = list(jobs)
    running: dict[Any, tuple[Path, int]] = {}
    done: dict[tuple[Path, int], Outcome] = {}
    while waiting or running:
        while waiting and len(running) < room:
            path, seed = waiting.pop(0)
            running[remote.remote(trial, path, seed, overrides[path.stem])] = path, seed
        ready, _ = ray.wait(list(running), num_returns=1)
        done[running.pop(ready[0])] = ray.get(ready[0])
    return [done[job] for job in jobs]


def _call(trial: Trial, path: Path, seed: int, overrides: Sequence[str]) -> Outcome:
    return trial(path, seed, overrides)


def search(trial: Trial, path: Path, overrides: Sequence[str], config: SearchConfig, room: int) -> list[str]:
    """The overrides of the best point of a search space that Ray Tune finds for a configuration with the first seed."""
    from ray import tune
    from ray.tune.search import BasicVariantGenerator

    def attempt(point: dict[str, Any]) -> None:
        suffix = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:8]
        outcome = trial(path, 0, [*overrides, *_settings(point)], f"-{suffix}")
        if outcome.score is None:
            raise RuntimeError(outcome.error)
        tune.report({"score": outcome.score})

    space = {
        key: tune.choice(given) if name == CHOICE else getattr(tune, name)(*given)
        for key, distribution in config.space.items()
        for name, given in distribution.items()
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
        run_config=tune.RunConfig(storage_path=str(trial.environment.home / "tune"), name=path.stem),
    ).fit()
    return [*overrides, *_settings(results.get_best_result().config or {})]


def _settings(point: Mapping[str, Any]) -> list[str]:
    """A point of a search space as overrides, which are read as YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in point.items()]


def best_of(rows: Sequence[Row], outcomes: Sequence[Outcome], higher_is_better: bool) -> tuple[Row, Outcome]:
    """The configuration with the best mean, and its best training."""
    best = max if higher_is_better else min
    _, row = best(((row.mean, row) for row in rows if row.mean is not None), key=lambda pair: pair[0])
    own = ((one.score, one) for one in outcomes if one.experiment == row.experiment and one.score is not None)
    return row, best(own, key=lambda pair: pair[0])[1]
