"""One rank's training: from the last sound checkpoint to the last step, whoever started the process.

It needs an initialised `torch.distributed` and nothing of Ray, so it runs under torchrun as well.
"""

import copy
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.checkpoints import Checkpoint, CheckpointStore
from models.training import randomness, snapshots
from models.training.config import TrainConfig
from models.training.optimizers import adamw
from models.training.order import Sample, pick
from models.training.parallel import Layers, local
from models.training.pipeline import Chain
from models.training.schedules import learning_rate
from models.training.task import Task

logger = logging.getLogger(__name__)

STOP_POLL_S = 1.0
FIRST_SCALE, GROW_AFTER = 2.0**16, 1000
"""What losses are multiplied by in fp16, and after how many good steps in a row it doubles."""
SKIPS = 30
"""Steps in a row whose gradients may be infinite or not a number."""


@dataclass(frozen=True)
class Listener:
    """Who is told how a rank gets on."""

    started: Callable[[int], None]
    """Called on every rank with the step from which it goes on."""
    metrics: Callable[[Mapping[str, float], int], None]
    """Called on rank 0 with metrics and the step."""
    validated: Callable[[Mapping[str, float]], None]
    """Called on every rank after each validation, with the step among the metrics."""
    progress: Callable[[Mapping[str, object]], None]
    """Called on rank 0 with every line of progress that is logged."""
    run_id: str | None = None
    """The MLflow run, kept with every checkpoint."""


@dataclass
class Place:
    """How far a run is: with the tensors of a checkpoint, all that a run needs to go on. It is saved as JSON."""

    step: int = 0
    metrics: Mapping[str, float] | None = None
    """Of the last validation."""
    best: tuple[tuple[float, int], ...] = ()
    """Value of the primary metric and step of the best validations, the best first."""
    stale: int = 0
    """Validations since the best one."""
    loss_scale: float = 1.0
    good: int = 0
    """Steps since the loss scale changed."""
    ended: str | None = None
    """Why training is over: `steps` or `patience`."""


class Worker:
    """One rank's part of the network, its optimizer and its place in the data.

    Args:
        task: what is trained.
        config: how.
        store: of checkpoints, the same for all ranks.
        device: where to train.
        listener: who is told.
    """

    def __init__(
        self, task: Task, config: TrainConfig, store: CheckpointStore, device: torch.device, listener: Listener
    ) -> None:
        self._task, self._config, self._store, self._device, self._listener = task, config, store, device, listener
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        randomness.seed(config.seed)
        network = task.build().to(device)
        whole = config.parallelism == "ddp" or self._world_size == 1
        self._plain = network if whole and config.average_decay is None else copy.deepcopy(network)
        pipeline = config.parallelism == "pipeline" and self._world_size > 1
        self._parallel = (Chain if pipeline else Layers)(task, network, config, device)
        self._draws = self._rank // self._parallel.copies  # the ranks that hold copies of a layer drop the same units
        randomness.seed(config.seed + 1 + self._draws)
        self._trained = {
            name: tensor for name, tensor in self._parallel.state().items() if isinstance(tensor, nn.Parameter)
        }
        self._trained = {name: parameter for name, parameter in self._trained.items() if parameter.requires_grad}
        self._parameters = list({id(parameter): parameter for parameter in self._trained.values()}.values())
        self._average = [] if config.average_decay is None else [p.detach().clone() for p in self._parameters]
        self._optimizer = adamw(self._parameters, config)
        self._place = Place(loss_scale=FIRST_SCALE if config.precision == "fp16" else 1.0)
        self._saving_group = dist.new_group(backend="gloo")
        self._saving: Future[Any] | None = None
        self._skipped = 0
        self._looked_s = time.monotonic()

    def train(self) -> Place:
        """Train from the last sound checkpoint to the end, or until the store is asked to stop."""
        self._resume()
        config, place = self._config, self._place
        progress = _Progress(place.step, config.steps)
        while place.ended is None:
            loss, stopping = self._advance()
            if place.step == config.steps:
                place.ended = "steps"
            if self._rank == 0 and (place.ended or place.step % config.log_every == 0):
                line = progress.line(place.step, loss)
                self._tell(line, {"train_loss": loss})
                self._listener.progress(line)
            validating = bool(place.ended) or place.step % config.validate_every == 0
            saving = validating or stopping or place.step % config.checkpoint_every == 0
            if saving:
                self._parallel.synchronize_buffers()
            if validating:
                self._validate()
            if saving:
                self._save()
            if stopping:
                break
        self._saved()
        return place

    def _advance(self) -> tuple[float, bool]:
        """One step over one global batch; the mean loss of its elements over all ranks, and whether to stop."""
        config, place, parallel = self._config, self._place, self._parallel
        samples = pick(place.step * config.batch_size, config.batch_size, self._task.size, config.seed)
        own = samples[parallel.data_rank :: parallel.data_size]
        batch = [
            {name: tensor.to(self._device) for name, tensor in self._task.batch(part).items()}
            for part in _cut(own, config.accumulate)
        ]
        for parameter in self._parameters:
            parameter.grad = None
        summed, counted = parallel.backward(batch, place.loss_scale / config.batch_size)
        sums = torch.tensor([summed, counted, self._stop_asked()], dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        total, count, stopping = sums.tolist()
        count /= parallel.copies
        self._apply(parallel.data_size * config.batch_size / (count * place.loss_scale))
        place.step += 1
        return total / parallel.copies / count, bool(stopping)

    def _apply(self, factor: float) -> None:
        """Step the optimizer by the gradients times a factor, clipped; leave out a step that is not finite."""
        place = self._place
        with_gradient = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = math.sqrt(float(self._parallel.squared_norm(with_gradient))) * factor
        if not math.isfinite(norm):
            return self._skip()
        factor *= min(1.0, self._config.clip_norm / (norm + 1e-6))
        torch._foreach_mul_([local(gradient) for gradient in with_gradient], factor)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._config, place.step)
        self._optimizer.step()
        self._skipped, place.good = 0, place.good + 1
        if self._config.precision == "fp16" and place.good == GROW_AFTER:
            place.loss_scale, place.good = place.loss_scale * 2, 0
        if self._config.average_decay is not None:
            decay = min(self._config.average_decay, (1 + place.step) / (10 + place.step))
            current = [local(parameter.detach()) for parameter in self._parameters]
            torch._foreach_lerp_([local(average) for average in self._average], current, 1 - decay)
        return None

    def _skip(self) -> None:
        self._skipped += 1
        step = self._place.step + 1
        if self._skipped > SKIPS:
            raise FloatingPointError(f"Gradients are not finite {SKIPS} times in a row, to step {step}.")
        if self._config.precision == "fp16":
            self._place.loss_scale, self._place.good = self._place.loss_scale / 2, 0
        if self._rank == 0:
            line = {"event": "step skipped", "step": step, "loss_scale": self._place.loss_scale}
            logger.warning(json.dumps(line | {"reason": "gradients are not finite"}))

    def _validate(self) -> None:
        """Validate a whole network on every rank, each with its share of the data."""
        place, task = self._place, self._task
        if self._plain is not self._parallel.network:
            self._parallel.fill(self._plain, self._parallel.state() | self._averages())
        self._plain.eval()
        with randomness.undisturbed(), torch.no_grad():
            shares = task.validate(self._plain, self._rank, self._world_size)
        sums = torch.tensor(list(shares.values()), dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        metrics = {name: float(total / count) for name, (total, count) in zip(shares, sums, strict=True)}
        ranked = sorted([*place.best, (metrics[task.primary], place.step)], key=self._goodness)
        place.stale = 0 if ranked[0][1] == place.step else place.stale + 1
        place.metrics, place.best = metrics, tuple(ranked[: self._config.keep_best])
        if self._config.patience is not None and place.stale >= self._config.patience:
            place.ended = place.ended or "patience"
        if self._rank == 0:
            named = {f"validation_{name}": value for name, value in metrics.items()}
            self._tell({"event": "validated", "step": place.step, **named}, named)
        self._listener.validated({"step": place.step, **metrics})

    def _goodness(self, validation: tuple[float, int]) -> tuple[float, int]:
        """Sorts the best first: of equal values the earlier one, and what is not a number last."""
        value, step = validation
        if math.isnan(value):
            return math.inf, step
        return (-value if self._task.higher_is_better else value), step

    def _tell(self, line: Mapping[str, object], metrics: Mapping[str, float]) -> None:
        logger.info(json.dumps(line))
        self._listener.metrics(metrics, self._place.step)

    def _stop_asked(self) -> bool:
        if self._rank != 0 or time.monotonic() - self._looked_s < STOP_POLL_S:
            return False
        self._looked_s = time.monotonic()
        return self._store.asked_to_stop()

    def _averages(self) -> dict[str, Tensor]:
        """The averaged weights by the names that the weights have."""
        places = {id(parameter): average for parameter, average in zip(self._parameters, self._average, strict=False)}
        return {name: places[id(parameter)] for name, parameter in self._trained.items() if places}

    def _state(self) -> dict[str, Tensor]:
        """All tensors that this rank holds and a run needs to go on, in place, except for its random state."""
        named = {id(parameter): name for name, parameter in reversed(self._trained.items())}
        moments = {
            f"optimizer/{named[id(parameter)]}/{key}": value
            for parameter, values in self._optimizer.state.items()
            for key, value in values.items()
        }
        network = {f"network/{name}": tensor.detach() for name, tensor in self._parallel.state().items()}
        return network | {f"average/{name}": tensor for name, tensor in self._averages().items()} | moments

    def _save(self) -> None:
        self._saved()
        state = self._state() | {f"random/{self._draws}": randomness.save()}
        steps = tuple(step for _, step in self._place.best)
        facts = {"place": dict(vars(self._place)), "run_id": self._listener.run_id}
        self._saving = snapshots.save(
            self._store, self._place.step, state, facts, steps, self._saving_group, self._config.asynchronous
        )

    def _saved(self) -> None:
        """Wait until the last checkpoint is committed."""
        if self._saving is not None:
            self._saving.result()
        self._saving = None

    def _resume(self) -> None:
        """Agree on the checkpoint that rank 0 finds sound, and load it."""
        found: list[Checkpoint | None] = [self._store.recover() if self._rank == 0 else None]
        dist.broadcast_object_list(found)
        if (checkpoint := found[0]) is not None:
            self._load(checkpoint)
        self._listener.started(self._place.step)

    def _load(self, checkpoint: Checkpoint) -> None:
        state = self._state()
        own = f"random/{self._draws}"
        known = snapshots.names(self._store, checkpoint)
        if own in known:
            state[own] = torch.empty(known[own][0], dtype=torch.uint8)
        snapshots.load(self._store, checkpoint, state, self._saving_group)
        if own in known:
            randomness.restore(state[own])
        facts = checkpoint.facts["place"]
        best = tuple((float(value), int(step)) for value, step in facts["best"])
        vars(self._place).update(facts | {"best": best})


def _cut(samples: list[Sample], parts: int) -> list[list[Sample]]:
    """Consecutive parts whose lengths differ by at most one."""
    ends = [len(samples) * number // parts for number in range(parts + 1)]
    return [samples[start:end] for start, end in zip(ends, ends[1:], strict=False)]


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
