"""Training on Ray Train that a killed worker, a killed job or a spoilt checkpoint doesn't change.

A task says what is trained; this module runs it on N workers with a fixed global batch. Sample number n of the whole
run is element `n % size` of the permutation of epoch `n // size`, which the seed alone decides; of a global batch the
worker of rank r takes samples r, r + N, r + 2N. So the state of the data is one number, and a run that goes on from a
checkpoint with the same number of workers ends with the same bits as one that was never disturbed.

What a task gives is in `models.training.task`, how it is trained in `models.training.config`, what one worker does in
`models.training.worker`.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray._private.worker import get_dashboard_url
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.callback import UserCallback
from torch import nn

from models.checkpoints import Checkpoint, CheckpointStore
from models.training import bar, snapshots
from models.training.config import SCHEDULING, TrainConfig
from models.training.order import Sample, pick
from models.training.parallel import require
from models.training.task import Task
from models.training.worker import Listener, Worker

__all__ = [
    "ATTEMPTS",
    "FAILURES",
    "SCHEDULING",
    "Fit",
    "Sample",
    "Task",
    "TrainConfig",
    "TrainingStopped",
    "best_of",
    "checkpoints",
    "fit",
    "pick",
    "run_of",
    "trained",
]

logger = logging.getLogger(__name__)

ATTEMPTS = "attempts.jsonl"
FAILURES = "failures.jsonl"
PROGRESS = "progress.json"
NICENESS = 15
"""Of training: on a machine that they share, stream workers and replicas come first."""


class TrainingStopped(KeyboardInterrupt):
    """Training was asked to stop by Ctrl-C or SIGTERM, and has left a checkpoint."""


@dataclass(frozen=True)
class Fit:
    """How a training ended: the best checkpoint's step and metrics, the last step, and what it took.

    `weights` is a file for `trained` with the best checkpoint's weights, averaged where averaging is configured;
    `final` has those of the last step.
    """

    steps: int
    best_step: int
    metrics: Mapping[str, float]
    weights: Path
    final: Path
    restarts: int
    seconds: float


def fit(
    task: Task,
    config: TrainConfig,
    *,
    folder: Path,
    config_hash: str,
    tracking_uri: str | None = None,
    run_id: str | None = None,
) -> Fit:
    """Train, from the last sound checkpoint in the store if there is one, and survive the death of workers.

    Args:
        task: what is trained.
        config: how.
        folder: the run's own, absolute, on a disk that all nodes share.
        config_hash: of everything that decides the weights; checkpoints of another one are refused.
        tracking_uri: MLflow's address, as the workers reach it. None: progress and metrics go to the log alone.
        run_id: the MLflow run to which they go.

    Ray must be initialised. Raises what Ray Train raises when the failures are more than `config.max_failures`,
    ParallelismError where the task can't be trained in the configured way, and TrainingStopped after SIGINT or SIGTERM,
    whose handlers it replaces meanwhile if it runs in the main thread.
    """
    require(task, config)
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    arguments = _Arguments(ray.put(task), config, folder, config_hash, tracking_uri, run_id)
    store = checkpoints(config, folder, config_hash)
    store.forget_to_stop()
    (folder / PROGRESS).unlink(missing_ok=True)
    with _stopping(store), bar.shown(folder / PROGRESS, config.steps):
        _in_thread(_trainer(arguments).fit)
    last = store.recover()
    if last is None:
        raise RuntimeError(f"{folder}: the last checkpoint was damaged after training; train again.")
    place = last.facts["place"]
    if place["ended"] is None:
        store.forget_to_stop()
        raise TrainingStopped(f"Training stopped after step {last.step}; the same command goes on from there.")
    best = best_of(store, last)
    return Fit(
        steps=last.step,
        best_step=best.step,
        metrics=best.facts["place"]["metrics"],
        weights=_export(store, best, folder / "best.pt"),
        final=_export(store, last, folder / "last.pt"),
        restarts=len((folder / ATTEMPTS).read_text(encoding="utf-8").splitlines()) - 1,
        seconds=time.monotonic() - started,
    )


def trained(task: Task, weights: Path) -> nn.Module:
    """The task's network with the weights of a file that `fit` has left."""
    network = task.build()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["network"])
    return network


def checkpoints(config: TrainConfig, folder: Path, config_hash: str) -> CheckpointStore:
    """Where a run in a folder has its checkpoints."""
    place = f"{config.storage.rstrip('/')}/{folder.name}" if config.storage else str(folder)
    return CheckpointStore.at(f"{place}/checkpoints", config_hash, config.keep)


def run_of(config: TrainConfig, folder: Path, config_hash: str) -> str | None:
    """The MLflow run of the checkpoints that a run in a folder goes on with; None where there are none."""
    found = checkpoints(config, folder, config_hash).recover()
    return None if found is None else found.facts.get("run_id")


@dataclass(frozen=True)
class _Arguments:
    task: "ray.ObjectRef[Task]"
    config: TrainConfig
    folder: Path
    config_hash: str
    tracking_uri: str | None
    run_id: str | None


class _Trainer(ray.train.torch.TorchTrainer):
    """Ray Train's, without what needs a dashboard where there is none.

    The actor that removes a dead run's placement group asks the dashboard whether the run is dead, and warns every
    other second that nobody answers. Without a dashboard Ray ends with this process, and its placement groups with it.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        if get_dashboard_url():  # type: ignore[no-untyped-call]
            return callbacks
        return [one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback)]


def _trainer(arguments: _Arguments) -> _Trainer:
    config = arguments.config
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    on_gpus = resources.get("GPU", 0) >= config.fewest_workers
    own = {"CPU": config.cpus_per_worker} | ({"GPU": 1.0} if on_gpus else {})
    return _Trainer(
        _work,
        train_loop_config={"arguments": arguments},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if on_gpus else "gloo", timeout_s=120),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers,  # type: ignore[arg-type]
            use_gpu=on_gpus,
            resources_per_worker=own,
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(arguments.folder),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            callbacks=[_Failures(arguments.folder / FAILURES)],  # type: ignore[list-item]
        ),
    )


class _Failures(UserCallback):
    """Notes when Ray Train's controller has noticed that workers failed, and why."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Append one line."""
        reasons = {str(rank): f"{type(error).__name__}: {error}"[:500] for rank, error in worker_exceptions.items()}
        _append(self._path, {"time_s": time.time(), "ranks": reasons})


def _work(loop_config: Mapping[str, _Arguments]) -> None:
    """Run on every worker, and again from the start after every failure."""
    arguments = loop_config["arguments"]
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
    os.nice(max(0, NICENESS - os.nice(0)))
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // ray.train.get_context().get_local_world_size()))

    @cache
    def run() -> Any:
        """Opened by rank 0, which alone reports; MLflow takes seconds to import, and the others start sooner so."""
        from models.runs import Run

        return Run(str(arguments.tracking_uri), str(arguments.run_id))

    def metrics(values: Mapping[str, float], step: int) -> None:
        if arguments.run_id is not None:
            run().log_metrics(values, step)

    def started(step: int) -> None:
        pids: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(pids, os.getpid())
        if dist.get_rank() == 0:
            attempt = {"step": step, "world_size": len(pids), "pids": pids, "time_s": time.time()}
            _append(arguments.folder / ATTEMPTS, attempt)
            logger.info(json.dumps({"event": "attempt", **attempt}))

    listener = Listener(
        started=started,
        metrics=metrics,
        validated=lambda metrics: ray.train.report(dict(metrics)),
        progress=lambda line: bar.note(arguments.folder / PROGRESS, line),
        run_id=arguments.run_id,
    )
    task, config = ray.get(arguments.task), arguments.config
    store = checkpoints(config, arguments.folder, arguments.config_hash)
    Worker(task, config, store, ray.train.torch.get_device(), listener).train()


def best_of(store: CheckpointStore, last: Checkpoint) -> Checkpoint:
    """The best checkpoint that is sound; the last one, of which that is known, if all the others are damaged."""
    for _, step in last.facts["place"]["best"]:
        if (found := store.load(step)) is not None:
            return found
        logger.warning(json.dumps({"event": "best checkpoint damaged", "step": step, "reason": "the next one is used"}))
    return last


def _export(store: CheckpointStore, checkpoint: Checkpoint, path: Path) -> Path:
    torch.save({"network": snapshots.load_weights(store, checkpoint)}, path)
    return path


def _append(path: Path, line: Mapping[str, object]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@contextmanager
def _stopping(store: CheckpointStore) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a note for the workers, and the second into KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.default_int_handler)
        logger.warning(json.dumps({"event": "stopping", "signal": signal.Signals(number).name}))
        store.ask_to_stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_thread(function: Callable[[], object]) -> None:
    """Run in a thread of its own, where Ray Train leaves Ctrl-C alone, and raise here what it raises."""
    failures: list[BaseException] = []

    def target() -> None:
        try:
            function()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
