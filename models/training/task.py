"""What a task gives to the harness; all of it is sent to the workers, so it must be picklable and hold no network."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from models.training.order import Sample


class Task(Protocol):
    """What is trained."""

    @property
    def size(self) -> int:
        """Samples of an epoch."""

    @property
    def primary(self) -> str:
        """The metric of `validate` by which the best checkpoint is chosen."""

    @property
    def higher_is_better(self) -> bool:
        """Whether the best value of the primary metric is the highest one or the lowest."""

    def build(self) -> nn.Module:
        """A new network; the random state is seeded before."""

    def batch(self, samples: Sequence[Sample]) -> Mapping[str, Tensor]:
        """The tensors of some samples, decided by nothing but their numbers."""

    def loss(self, network: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """The sum of the losses of a batch, and the number of elements over which it sums."""

    def validate(self, network: nn.Module, rank: int, world_size: int) -> Mapping[str, tuple[float, float]]:
        """One rank's share of each validation metric as (sum, count); the metric is sum / count over all ranks."""


class Sliceable(Protocol):
    """A task whose layers several workers can share (tensor parallel)."""

    def tensor_plan(self, network: nn.Module) -> Mapping[str, ParallelStyle]:
        """How each of the network's modules is sliced, as `parallelize_module` takes it."""


class Cuttable(Protocol):
    """A task whose network is a chain of parts, each taking the one tensor that the part before gives.

    The tensors between parts must have the same shape on every step.
    """

    def cut(self, network: nn.Module, parts: int) -> Sequence[nn.Module]:
        """The chain, made of the network's own modules; no parameter is in two parts."""

    def ends(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the first part takes, and what the output of the last one is compared with; samples along axis 0."""

    def output_loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, int]:
        """What `loss` gives, from the output of the last part."""
