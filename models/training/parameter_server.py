"""Data parallel training through a parameter server (Li et al., 2014), to compare with all-reduce.

A server, a Ray actor, holds the weights and the optimizer. Workers, Ray actors too, send it the gradients of their
share of each batch and get weights back: in step with each other, which is what all-reduce computes, or up to a number
of steps apart (stale synchronous parallel: Ho et al., 2013). No fault is survived here: `models.trainer` is for that.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch
from torch import Tensor, nn

from models.training import randomness
from models.training.config import TrainConfig
from models.training.optimizers import adamw
from models.training.order import pick
from models.training.schedules import learning_rate
from models.training.task import Task


@dataclass(frozen=True)
class Served:
    """What a training through a server gave.

    Attributes:
        weights: the network's state at the end.
        losses: of each step, the mean over the batch.
        lead: the largest number of steps that a worker was ahead of the slowest one.
        steps_per_s: from the end of the first step to that of the last.
    """

    weights: Mapping[str, Tensor]
    losses: Mapping[int, float]
    lead: int
    steps_per_s: float


class Server:
    """The weights, changed by gradients as they arrive.

    Args:
        task: what is trained.
        config: how; its workers, batch, schedule and clipping count, and its precision and average don't.
        staleness: how many steps a worker may be ahead of the slowest one; None: all take each step together.
    """

    def __init__(self, task: Task, config: TrainConfig, staleness: int | None) -> None:
        torch.set_num_threads(1)
        randomness.seed(config.seed)
        self._network = task.build()
        self._parameters = [one for one in self._network.parameters() if one.requires_grad]
        self._optimizer = adamw(self._parameters, config)
        self._config, self._staleness = config, staleness
        self._clocks = [0] * config.fewest_workers
        self._sums = {step: [0.0, 0.0] for step in range(config.steps)}
        self._arrived: dict[int, list[Tensor]] = {}
        self._changed = asyncio.Condition()
        self._lead, self._first_s, self._last_s = 0, 0.0, 0.0

    async def weights(self) -> list[Tensor]:
        """The trained parameters as they are now."""
        return [parameter.detach().clone() for parameter in self._parameters]

    async def push(self, rank: int, gradients: list[Tensor], total: float, count: int) -> list[Tensor]:
        """Take a worker's gradients of its next step; the weights with which it may take the one after.

        Args:
            rank: of the worker.
            gradients: of the sum of its losses.
            total: that sum.
            count: over how many elements it sums.
        """
        async with self._changed:
            step = self._clocks[rank]
            self._clocks[rank] += 1
            self._lead = max(self._lead, max(self._clocks) - min(self._clocks))
            self._sums[step][0] += total
            self._sums[step][1] += count
            if self._staleness is None:
                self._arrived[rank] = gradients
                if len(self._arrived) == len(self._clocks):
                    ordered = zip(*(self._arrived[one] for one in sorted(self._arrived)), strict=True)
                    self._apply([torch.stack(parts).sum(0) for parts in ordered], self._sums[step][1], step, 1.0)
                    self._arrived = {}
            else:
                self._apply(gradients, count, step, 1 / len(self._clocks))
            now = time.monotonic()
            self._first_s, self._last_s = self._first_s or now, now
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._clocks[rank] - min(self._clocks) <= (self._staleness or 0))
        return await self.weights()

    async def result(self) -> Served:
        """What it came to."""
        losses = {step + 1: total / count for step, (total, count) in self._sums.items()}
        speed = (self._config.steps - 1) / max(self._last_s - self._first_s, 1e-9)
        return Served(dict(self._network.state_dict()), losses, self._lead, speed)

    def _apply(self, gradients: list[Tensor], count: float, step: int, share: float) -> None:
        """One step of the optimizer by a sum of gradients over `count` elements, at a share of the learning rate."""
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient / count
        nn.utils.clip_grad_norm_(self._parameters, self._config.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._config, step) * share
        self._optimizer.step()


def train(task: Task, config: TrainConfig, staleness: int | None = None) -> Served:
    """Train with `config.fewest_workers` workers and a server on the Ray that is initialised, to the last step."""
    shared = ray.put(task)
    remote: Any = ray.remote
    cpus, concurrency = config.cpus_per_worker, config.fewest_workers + 1
    server = remote(num_cpus=cpus, max_concurrency=concurrency)(Server).remote(shared, config, staleness)
    worker = remote(num_cpus=cpus)(_work)
    ray.get([worker.remote(rank, shared, config, server) for rank in range(config.fewest_workers)])
    served: Served = ray.get(server.result.remote())
    ray.kill(server)
    return served


def _work(rank: int, task: Task, config: TrainConfig, server: Any) -> None:
    torch.set_num_threads(1)
    randomness.seed(config.seed + 1 + rank)
    network = task.build()
    parameters: list[Tensor] = [one for one in network.parameters() if one.requires_grad]
    network.train()
    weights: list[Tensor] = ray.get(server.weights.remote())
    for step in range(config.steps):
        with torch.no_grad():
            torch._foreach_copy_(parameters, weights)
        samples = pick(step * config.batch_size, config.batch_size, task.size, config.seed)
        total, count = task.loss(network, task.batch(samples[rank :: config.fewest_workers]))
        gradients = list(torch.autograd.grad(total, parameters))
        weights = ray.get(server.push.remote(rank, gradients, float(total.detach()), count))
