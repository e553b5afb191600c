"""Data-parallel training on Ray Train that a killed worker, a killed job or a spoilt checkpoint doesn't change.

A task says what is trained; this module runs it on N workers with a fixed global batch. Sample number n of the whole
run is element `n % size` of the permutation of epoch `n // size`, which the seed alone decides; of a global batch the
worker of rank r takes samples r, r + N, r + 2N. So the state of the data is one number, and a run that goes on from a
checkpoint with the same number of workers ends with the same bits as one that was never disturbed.
"""

import json
import logging
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from models.checkpoints import Checkpoint, CheckpointStore
from models.runs import Run

logger = logging.getLogger(__name__)

Sample = tuple[int, int]
"""Epoch and index within it."""

ATTEMPTS = "attempts.jsonl"
SHARED = "shared.pt"


class TrainConfig(BaseModel):
    """How a task is trained; `batch_size` is the global one, whatever the number of workers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = None
    """Name of the run: one that is unfinished goes on. None: named by a hash of the configuration."""
    steps: int = Field(1200, ge=1)
    batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    warmup: float = Field(0.1, gt=0, lt=1)
    """Fraction of the steps in which the learning rate rises; then it falls by a cosine."""
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    seed: int = 0
    workers: int = Field(2, ge=1)
    cpus_per_worker: float = Field(0.5, gt=0)
    """Logical CPUs that Ray sets aside; threads are the machine's cores divided by the workers."""
    max_failures: int = Field(3, ge=-1)
    """How often a group of workers is started again; -1 means always."""
    checkpoint_every: int = Field(100, ge=1)
    validate_every: int = Field(300, ge=1)
    log_every: int = Field(50, ge=1)
    keep: int = Field(2, ge=2)
    """Newest checkpoints that stay, besides the best one."""

    @model_validator(mode="after")
    def _enough(self) -> "TrainConfig":
        if self.batch_size < self.workers:
            raise ValueError("batch_size must be at least the number of workers")
        return self


class Task(Protocol):
    """What is trained. It is sent to every worker, so it must be picklable and must not hold a network."""

    @property
    def size(self) -> int:
        """Samples of an epoch."""

    @property
    def primary(self) -> str:
        """The metric of `validate` by which the best checkpoint is chosen, the lowest being the best."""

    def build(self) -> nn.Module:
        """A new network; the random state is seeded before."""

    def batch(self, samples: Sequence[Sample]) -> Mapping[str, Tensor]:
        """The tensors of some samples, decided by nothing but their numbers."""

    def loss(self, network: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """The sum of the losses of a batch, and the number of elements over which it sums."""

    def validate(self, network: nn.Module, rank: int, world_size: int) -> Mapping[str, tuple[float, float]]:
        """One rank's share of each validation metric as (sum, count); the metric is sum / count over all ranks."""


@dataclass(frozen=True)
class Fit:
    """How a training ended: the best checkpoint's step, metrics and shared state, and what it took.

    `weights` is the file of the best checkpoint that `load_weights` reads; `final` that of the last step.
    """

    steps: int
    best_step: int
    metrics: Mapping[str, float]
    weights: Path
    final: Path
    restarts: int
    seconds: float


def pick(first: int, count: int, size: int, seed: int) -> list[Sample]:
    """Samples first .. first + count - 1 of a run, across the ends of epochs; none is skipped or repeated."""
    numbers = range(first, first + count)
    return [(number // size, int(_permutation(seed, number // size, size)[number % size])) for number in numbers]


def fit(task: Task, config: TrainConfig, *, folder: Path, config_hash: str, tracking_uri: str, run_id: str) -> Fit:
    """Train, from the last sound checkpoint in the folder if there is one, and survive the death of workers.

    Args:
        task: what is trained.
        config: how.
        folder: the run's own, absolute, on a disk that all nodes share.
        config_hash: of everything that decides the weights; checkpoints of another one are refused.
        tracking_uri: MLflow's address, as the workers reach it.
        run_id: the MLflow run to which progress and metrics go.

    Ray must be initialised. Raises what Ray Train raises when the failures are more than `config.max_failures`.
    """
    started = time.monotonic()
    arguments = _Arguments(ray.put(task), config, folder, config_hash, tracking_uri, run_id)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    on_gpus = resources.get("GPU", 0) >= config.workers
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"arguments": arguments},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if on_gpus else "gloo", timeout_s=120),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers, use_gpu=on_gpus, resources_per_worker=_resources(config, on_gpus)
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
        ),
    )
    trainer.fit()
    store = _store(folder, config, config_hash)
    last = store.load(config.steps)
    best = store.load(int(last.facts["best_step"])) if last else None
    if last is None or best is None:
        raise RuntimeError(f"{folder}: the last or the best checkpoint was damaged after training; train again.")
    return Fit(
        steps=last.step,
        best_step=best.step,
        metrics=best.facts["metrics"],
        weights=best.folder / SHARED,
        final=last.folder / SHARED,
        restarts=len((folder / ATTEMPTS).read_text(encoding="utf-8").splitlines()) - 1,
        seconds=time.monotonic() - started,
    )


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill a network with the weights of a checkpoint's shared file."""
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["network"])


@dataclass(frozen=True)
class _Arguments:
    task: "ray.ObjectRef[Task]"
    config: TrainConfig
    folder: Path
    config_hash: str
    tracking_uri: str
    run_id: str


def _work(loop_config: Mapping[str, _Arguments]) -> None:
    """Run on every worker, and again from the start after every failure."""
    arguments = loop_config["arguments"]
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // arguments.config.workers))
    _Worker(arguments, ray.get(arguments.task)).train()


class _Worker:
    """One rank's network, optimiser and place in the data."""

    def __init__(self, arguments: _Arguments, task: Task) -> None:
        context = ray.train.get_context()
        self._rank, self._world_size = context.get_world_rank(), context.get_world_size()
        self._arguments, self._config, self._task = arguments, arguments.config, task
        self._store = _store(arguments.folder, arguments.config, arguments.config_hash)
        self._device = ray.train.torch.get_device()
        _seed(self._config.seed)
        self._network = task.build()
        self._parallel = ray.train.torch.prepare_model(self._network)
        _seed(self._config.seed + 1 + self._rank)
        trained = [parameter for parameter in self._network.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            trained, self._config.learning_rate, betas=(0.9, 0.98), weight_decay=self._config.weight_decay
        )
        self._scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer,
            self._config.learning_rate,
            total_steps=self._config.steps,
            pct_start=self._config.warmup,
            cycle_momentum=False,
        )
        self._step = 0
        self._best: tuple[float, int] = (sys.float_info.max, 0)
        self._metrics: dict[str, float] = {}

    def train(self) -> None:
        """Train from the last sound checkpoint to the last step."""
        self._resume()
        progress = _Progress(self._step, self._config.steps)
        while self._step < self._config.steps:
            loss = self._advance()
            last = self._step == self._config.steps
            if self._rank == 0 and (last or self._step % self._config.log_every == 0):
                self._report(progress.line(self._step, loss), {"train_loss": loss})
            validated = last or self._step % self._config.validate_every == 0
            if validated:
                self._validate()
            if validated or self._step % self._config.checkpoint_every == 0:
                self._save()

    @cached_property
    def _run(self) -> Run:
        """Opened by rank 0 only, which alone reports."""
        return Run(self._arguments.tracking_uri, self._arguments.run_id)

    def _advance(self) -> float:
        """One step over one global batch; the mean loss of its elements, over all ranks."""
        size = self._config.batch_size
        samples = pick(self._step * size, size, self._task.size, self._config.seed)[self._rank :: self._world_size]
        batch = {name: tensor.to(self._device) for name, tensor in self._task.batch(samples).items()}
        self._parallel.train()
        total, count = self._task.loss(self._parallel, batch)
        sums = torch.tensor([float(total.detach()), float(count)], dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        self._optimizer.zero_grad(set_to_none=True)
        (total * (self._world_size / sums[1].item())).backward()
        nn.utils.clip_grad_norm_(self._network.parameters(), self._config.clip_norm)
        self._optimizer.step()
        self._scheduler.step()
        self._step += 1
        return float(sums[0] / sums[1])

    def _validate(self) -> None:
        self._network.eval()
        state = _random_state()
        with torch.no_grad():
            shares = self._task.validate(self._network, self._rank, self._world_size)
        _set_random_state(state)
        sums = torch.tensor(list(shares.values()), dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        self._metrics = {name: float(total / count) for name, (total, count) in zip(shares, sums, strict=True)}
        self._best = min(self._best, (self._metrics[self._task.primary], self._step))
        if self._rank == 0:
            metrics = {f"validation_{name}": value for name, value in self._metrics.items()}
            self._report({"event": "validated", "step": self._step, **metrics}, metrics)
        ray.train.report({"step": self._step, **self._metrics})

    def _report(self, line: Mapping[str, object], metrics: Mapping[str, float]) -> None:
        logger.info(json.dumps(line))
        self._run.log_metrics(metrics, self._step)

    def _save(self) -> None:
        folder = self._store.begin(self._step)
        torch.save(_random_state(), folder / f"rank-{self._rank}.pt")
        if self._rank == 0:
            shared = {
                "network": self._network.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "scheduler": self._scheduler.state_dict(),
            }
            torch.save(shared, folder / SHARED)
        dist.barrier()
        if self._rank == 0:
            facts = {
                "samples": self._step * self._config.batch_size,
                "metrics": self._metrics,
                "best_score": self._best[0],
                "best_step": self._best[1],
                "run_id": self._arguments.run_id,
            }
            self._store.commit(self._step, self._world_size, self._best[1], facts)

    def _resume(self) -> None:
        """Agree on the checkpoint that rank 0 finds sound, and load it."""
        pids: list[object] = [None] * self._world_size
        dist.all_gather_object(pids, os.getpid())
        found: list[Checkpoint | None] = [None]
        if self._rank == 0:
            found = [self._store.recover()]
            attempt = {"step": found[0].step if found[0] else 0, "world_size": self._world_size, "pids": pids}
            with (self._arguments.folder / ATTEMPTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(attempt) + "\n")
            logger.info(json.dumps({"event": "attempt", **attempt}))
        dist.broadcast_object_list(found)
        if (checkpoint := found[0]) is None:
            return
        shared = torch.load(checkpoint.folder / SHARED, map_location=self._device, weights_only=True)
        self._network.load_state_dict(shared["network"])
        self._optimizer.load_state_dict(shared["optimizer"])
        self._scheduler.load_state_dict(shared["scheduler"])
        own = checkpoint.folder / f"rank-{self._rank}.pt"
        if own.exists():
            _set_random_state(torch.load(own, weights_only=True))
        self._step = checkpoint.step
        self._best = (checkpoint.facts["best_score"], checkpoint.facts["best_step"])
        self._metrics = checkpoint.facts["metrics"]


class _Progress:
    """Speed since the start of this attempt, and the time that is left at that speed."""

    def __init__(self, first: int, last: int) -> None:
        self._first, self._last, self._started = first, last, time.monotonic()

    def line(self, step: int, loss: float) -> dict[str, object]:
        seconds = time.monotonic() - self._started
        eta_s = seconds / (step - self._first) * (self._last - step)
        return {
            "event": "progress",
            "step": step,
            "of": self._last,
            "loss": round(loss, 4),
            "seconds": round(seconds, 1),
            "eta_s": round(eta_s, 1),
        }


def _store(folder: Path, config: TrainConfig, config_hash: str) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints", config_hash, config.keep)


def _resources(config: TrainConfig, on_gpus: bool) -> dict[str, float]:
    return {"CPU": config.cpus_per_worker} | ({"GPU": 1.0} if on_gpus else {})


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng([seed, epoch]).permutation(size)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _random_state() -> dict[str, Any]:
    """Of Python, numpy and torch, in types that `torch.load(weights_only=True)` reads."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])
