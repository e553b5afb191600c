"""Pruning by channels: what it removes is gone, and what does nothing can be removed without a change."""

import pytest
import torch
from torch import nn

from models.segmentation.config import NetworkConfig
from models.segmentation.predict import build
from models.segmentation.prune import PruneError, pruned

OPTIONS = [
    {},
    {"residual": True},
    {"attention": True},
    {"residual": True, "attention": True, "activation": "silu"},
    {"norm": "instance", "activation": "gelu"},
    {"norm": "none", "activation": "leaky_relu"},
    {"norm": "none", "residual": True},
    {"features": (8, 8, 12), "residual": True},
]


def network(**options):
    torch.manual_seed(1)
    size = NetworkConfig.model_validate({"features": (8, 12)} | options)
    made = build(size)
    for weight in made.parameters():
        weight.data += 0.1 * torch.rand_like(weight)  # so that no two channels are equally strong
    made(torch.rand(4, 1, 32, 32))  # moves the running means of the norms
    return made.eval(), size


def silence(made):
    """Let every second channel of every layer do nothing."""
    with torch.no_grad():
        for layer in made.modules():
            if layer is made.last or not isinstance(
                layer, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d | nn.InstanceNorm2d
            ):
                continue
            if isinstance(layer, nn.ConvTranspose2d):
                layer.weight[:, ::2] = 0
            elif not isinstance(layer, nn.Conv2d) or layer.out_channels > 1:
                layer.weight[::2] = 0
            if layer.bias is not None and layer.bias.numel() > 1:
                layer.bias[::2] = 0
        for gate in made.gates:
            if hasattr(gate, "weight"):
                gate.weight.weight[:, ::2] = 0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_channels_that_do_nothing_go_without_a_change(options):
    made, size = network(**options)
    silence(made)
    slim, new_size = pruned(made, size, 0.5)
    assert new_size.features == tuple(width // 2 for width in size.features)
    image = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.allclose(slim(image), made(image), atol=1e-5)
        assert made(image).std() > 0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_half_the_channels_are_a_quarter_of_the_weights(options):
    made, size = network(**options)
    before = {name: weight.clone() for name, weight in made.state_dict().items()}
    slim, _ = pruned(made, size, 0.5)
    ratio = sum(weight.numel() for weight in slim.parameters()) / sum(weight.numel() for weight in made.parameters())
    assert 0.23 < ratio < 0.32
    assert all(torch.equal(weight, before[name]) for name, weight in made.state_dict().items())


def test_group_norm_is_pruned_where_its_groups_still_divide():
    made, size = network(norm="group")
    with pytest.raises(PruneError, match=r"leaves features \[4, 6\].*multiples of 4"):
        pruned(made, size, 0.5)
    slim, new_size = pruned(*network(norm="group", features=(8, 16)), 0.5)
    assert new_size.features == (4, 8)
    assert slim(torch.rand(1, 1, 16, 16)).shape == (1, 1, 16, 16)


def test_levels_that_become_equally_wide_are_refused_where_a_block_would_join_them():
    with pytest.raises(PruneError, match="equally wide"):
        pruned(*network(features=(3, 4), residual=True), 0.25)
    assert pruned(*network(features=(3, 4)), 0.25)[1].features == (3, 3)
