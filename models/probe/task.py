"""A chain of layers that learns the sign of a sum of numbers made on the fly, in whatever size is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from models.training.order import Sample

INPUTS = 8
VALIDATION = range(1_000_000, 1_000_033)


@dataclass(frozen=True)
class ProbeTask:
    """Learns whether the sum of eight numbers is positive.

    `normalise` adds a layer with running means, whose values depend on how many workers share a batch.
    """

    size: int = 40
    width: int = 16
    layers: int = 1
    dropout: float = 0.0
    normalise: bool = False

    primary = "accuracy"
    higher_is_better = True

    def build(self) -> nn.Module:
        """A chain: in, pairs of layers, out."""
        inner: list[nn.Module] = []
        for _ in range(self.layers):
            inner += [nn.Linear(self.width, self.width), nn.Tanh(), nn.Linear(self.width, self.width)]
        ends = [nn.BatchNorm1d(self.width)] if self.normalise else []
        return nn.Sequential(
            nn.Linear(INPUTS, self.width), nn.Tanh(), nn.Dropout(self.dropout), *inner, *ends, nn.Linear(self.width, 2)
        )

    def batch(self, samples: Sequence[Sample]) -> Mapping[str, Tensor]:
        """`inputs` float32[B, 8] and `labels` int64[B]."""
        drawn = [torch.randn(INPUTS, generator=torch.Generator().manual_seed(index)) for _, index in samples]
        inputs = torch.stack(drawn)
        return {"inputs": inputs, "labels": (inputs.sum(1) > 0).long()}

    def loss(self, network: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """The sum of the samples' cross-entropies."""
        return self.output_loss(network(batch["inputs"]), batch["labels"])

    def validate(self, network: nn.Module, rank: int, world_size: int) -> Mapping[str, tuple[float, float]]:
        """The accuracy on samples that training never sees."""
        samples = [(0, number) for number in VALIDATION[rank::world_size]]
        if not samples:
            return {"accuracy": (0.0, 0.0)}
        device = next(network.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in self.batch(samples).items()}
        right = (network(batch["inputs"]).argmax(1) == batch["labels"]).sum()
        return {"accuracy": (float(right), len(samples))}

    def tensor_plan(self, network: nn.Module) -> Mapping[str, ParallelStyle]:
        """Of each pair of layers the first is sliced by columns, the second by rows."""
        return {
            name: plan
            for pair in range(self.layers)
            for name, plan in ((str(3 + 3 * pair), ColwiseParallel()), (str(5 + 3 * pair), RowwiseParallel()))
        }

    def cut(self, network: nn.Module, parts: int) -> Sequence[nn.Module]:
        """Parts of about the same number of layers."""
        layers = list(network.children())
        ends = [len(layers) * number // parts for number in range(parts + 1)]
        return [nn.Sequential(*layers[start:end]) for start, end in zip(ends, ends[1:], strict=False)]

    def ends(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The numbers and the labels."""
        return batch["inputs"], batch["labels"]

    def output_loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, int]:
        """The sum of the samples' cross-entropies."""
        return nn.functional.cross_entropy(output, target, reduction="sum"), len(target)
