"""One network on several workers as a chain of parts, through which microbatches go one after the other (1F1B).

Each rank has one part and all samples; while a part works on one microbatch, the part before works on the next.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from models.training.config import TrainConfig
from models.training.parallel import autocast
from models.training.task import Cuttable, Task


class Chain:
    """One rank's part of the network."""

    data_rank, data_size, copies = 0, 1, 1

    def __init__(self, task: Task, network: nn.Module, config: TrainConfig, device: torch.device) -> None:
        self._task, self._device = cast(Cuttable, task), device
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        parts = self._task.cut(network, self._world_size)
        self.network = parts[self._rank]
        state = network.state_dict(keep_vars=True)
        members = [{id(one) for one in [*part.parameters(), *part.buffers()]} for part in parts]
        self._owners = {
            name: next(rank for rank, own in enumerate(members) if id(tensor) in own) for name, tensor in state.items()
        }
        self._own = {name: tensor for name, tensor in state.items() if self._owners[name] == self._rank}
        precision = autocast(config, device)
        self.network.forward = precision(self.network.forward)
        self._output_loss = precision(self._task.output_loss)
        self._scale = 1.0
        self._sums: list[tuple[float, int]] = []
        stage = PipelineStage(self.network, self._rank, self._world_size, device)
        self._schedule = Schedule1F1B(stage, config.accumulate, loss_fn=self._loss, scale_grads=False)

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers of this part by the names that they have in the whole network."""
        return self._own

    def backward(self, batch: Sequence[Mapping[str, Tensor]], scale: float) -> tuple[float, float]:
        """Add the gradients of a batch's parts, their losses multiplied by `scale`; the sum and count of the losses.

        Only the last rank knows the losses; the others give 0 and 0.
        """
        self.network.train()
        self._scale, self._sums = scale, []
        ends = [self._task.ends(part) for part in batch]
        if self._rank == 0:
            self._schedule.step(torch.cat([first for first, _ in ends]))
        elif self._rank == self._world_size - 1:
            self._schedule.step(target=torch.cat([target for _, target in ends]))
        else:
            self._schedule.step()
        sums = self._sums[-len(batch) :]  # without those of torch, which tries the loss once to see its shape
        return sum(total for total, _ in sums), sum(count for _, count in sums)

    def squared_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """The squared norm of the whole gradient, over all parts."""
        total = torch.stack(torch._foreach_norm(list(gradients))).square().sum()
        dist.all_reduce(total)
        return total

    def synchronize_buffers(self) -> None:
        """Do nothing: each buffer is on one rank only."""

    def fill(self, plain: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Copy the state, of which each rank has a part, into a whole network."""
        with torch.no_grad():
            for name, target in plain.state_dict().items():
                if self._owners[name] == self._rank:
                    target.copy_(values[name])
                dist.broadcast(target, src=self._owners[name])

    def _loss(self, output: Any, target: Tensor) -> Tensor:
        total: Tensor
        total, count = self._output_loss(output, target)
        self._sums.append((float(total.detach()), count))
        return total * self._scale
