"""One network on several workers: whole (DDP), sharded (FSDP2), sliced (tensor parallel), or sharded and sliced.

Gradients come out as means over the workers that see different samples, whatever the parallelism; a pipeline, which
shares nothing of this, is in `models.training.pipeline`.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from models.training.config import TrainConfig
from models.training.task import Sliceable, Task

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ParallelismError(ValueError):
    """A task that can't be trained in the configured way, in one sentence."""


def require(task: Task, config: TrainConfig) -> None:
    """Raise ParallelismError where a task has not what the configured parallelism takes."""
    if config.most_workers == 1:
        return
    if config.parallelism in ("tensor", "fsdp+tensor") and not hasattr(task, "tensor_plan"):
        raise ParallelismError(f"{type(task).__name__} has no tensor_plan; set train.parallelism to fsdp or ddp.")
    if config.parallelism == "pipeline" and not hasattr(task, "cut"):
        raise ParallelismError(f"{type(task).__name__} cannot be cut; set train.parallelism to fsdp or ddp.")


class Layers:
    """One rank's share of every layer of the network, and of the samples.

    `data_rank` of `data_size` is which share of each batch this rank has; ranks that slice one layer have the same.
    """

    def __init__(self, task: Task, network: nn.Module, config: TrainConfig, device: torch.device) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        sliced_over = {"tensor": world_size, "fsdp+tensor": config.tensor_size}.get(config.parallelism, 1)
        self._task, self._config, self._device = task, config, device
        self.data_rank, self.data_size = rank // sliced_over, world_size // sliced_over
        self.copies = sliced_over
        self.network = self._parallel = network
        if world_size == 1:
            return
        if config.parallelism == "ddp":
            self._parallel = DistributedDataParallel(network, gradient_as_bucket_view=True)
            return
        mesh = init_device_mesh(device.type, (self.data_size, sliced_over), mesh_dim_names=("data", "tensor"))
        if sliced_over > 1:
            parallelize_module(network, mesh["tensor"], dict(cast(Sliceable, task).tensor_plan(network)))
        if self.data_size > 1:
            for block in _blocks(network):
                fully_shard(block, mesh=mesh["data"])
            fully_shard(network, mesh=mesh["data"])

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers by the names that they have in the network, as this rank holds them."""
        return dict(self.network.state_dict(keep_vars=True))

    def backward(self, batch: Sequence[Mapping[str, Tensor]], scale: float) -> tuple[float, float]:
        """Add the gradients of a batch's parts, their losses multiplied by `scale`; the sum and count of the losses."""
        self._parallel.train()
        summed = counted = 0.0
        for number, part in enumerate(batch, start=1):
            with self._last(number == len(batch)):
                with autocast(self._config, self._device):
                    total, count = self._task.loss(self._parallel, part)
                (total * scale).backward()  # type: ignore[no-untyped-call]
            summed, counted = summed + float(total.detach()), counted + count
        return summed, counted

    def squared_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """The squared norm of the whole gradient, of which this rank has shards."""
        total = torch.zeros((), device=self._device)
        for group, parts in _by_sharding(gradients).items():
            square = torch.stack(torch._foreach_norm(parts)).square().sum()
            for over in group:
                dist.all_reduce(square, group=over)
            total += square
        return total

    def synchronize_buffers(self) -> None:
        """Give all ranks the buffers of rank 0, such as running means, that every rank keeps by itself."""
        for buffer in self.network.buffers():
            dist.broadcast(buffer, src=0)

    def fill(self, plain: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Copy the state, of which ranks may hold shards, into a whole network."""
        with torch.no_grad():
            for name, target in plain.state_dict().items():
                value = values[name].detach()
                target.copy_(value.full_tensor() if isinstance(value, DTensor) else value)

    def _last(self, last: bool) -> AbstractContextManager[None]:
        """Workers exchange gradients once a batch, with its last part."""
        if isinstance(self._parallel, DistributedDataParallel) and not last:
            return self._parallel.no_sync()
        if isinstance(self._parallel, FSDPModule):
            self._parallel.set_requires_gradient_sync(last)
        return nullcontext()


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The configured precision, as a context or a decorator."""
    return torch.autocast(device.type, DTYPES[config.precision], enabled=config.precision != "fp32")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The members of lists of modules, such as a transformer's layers: units that are gathered one after the other."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    return [block for blocks in lists for block in blocks if any(True for _ in block.parameters())]


def _by_sharding(tensors: Iterable[Tensor]) -> dict[tuple[dist.ProcessGroup, ...], list[Tensor]]:
    """What this rank holds of each tensor, by the groups of ranks over which the tensor is spread."""
    found: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for tensor in tensors:
        groups: tuple[dist.ProcessGroup, ...] = ()
        if isinstance(tensor, DTensor):
            mesh, placements = tensor.device_mesh, tensor.placements
            spread = (axis for axis, placement in enumerate(placements) if not placement.is_replicate())
            groups = tuple(mesh.get_group(axis) for axis in spread)
        found.setdefault(groups, []).append(local(tensor))
    return found
