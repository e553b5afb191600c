"""Structured pruning: a U-Net without its weakest channels, which is a smaller U-Net.

Zeroed weights shrink no file and speed nothing up, so whole channels go: the same share of every layer. How much a
channel matters is the scale that its norm gives it (Liu et al., 2017), or the size of its weights where it has no norm.
What a channel fed goes with it: inputs of later layers, the part of a decoder that a skip fills, the gate of the skip.

Layers are `Any` here, since torch declares the children of a module as tensors or modules.
"""

from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from models.segmentation import predict
from models.segmentation.config import NetworkConfig
from models.segmentation.network import UNet


class PruneError(ValueError):
    """A network that can't be pruned as asked, in one sentence."""


def pruned(network: UNet, size: NetworkConfig, share: float) -> tuple[UNet, NetworkConfig]:
    """A U-Net without that share of each level's channels, rounded down, and its size; the given one stays as it is.

    Raises:
        PruneError: what is left is no network of this kind.
    """
    features = [width - int(width * share) for width in size.features]
    try:
        slim_size = NetworkConfig.model_validate(size.model_dump() | {"features": features})
    except ValidationError as error:
        raise PruneError(f"Pruning by {share:g} leaves features {features}: {error.errors()[0]['msg']}.") from None
    slim = predict.build(slim_size)
    with torch.no_grad():
        _fill(slim, network)
    return slim.eval(), slim_size


def _fill(slim: UNet, network: UNet) -> None:
    """Copy the channels that stay, from the first layer to the last."""
    channels = torch.arange(1)
    skips: list[Tensor] = []
    new_rise: Any
    old_rise: Any
    for new, old in zip(slim.encoders, network.encoders, strict=True):
        channels = _block(new, old, channels)
        skips.append(channels)
    channels = _block(slim.lowest, network.lowest, channels)
    for level in reversed(range(len(skips))):
        new_rise, old_rise = slim.rises[level], network.rises[level]
        risen = _strongest(_scale(old_rise), new_rise.out_channels)
        _copy(new_rise, old_rise, risen, channels)
        if network.attention:
            _gate(slim.gates[level], network.gates[level], skips[level], risen)
        joined = torch.cat([skips[level], old_rise.out_channels + risen])
        channels = _block(slim.decoders[level], network.decoders[level], joined)
    _copy(slim.last, network.last, torch.arange(1), channels)


def _block(new: Any, old: Any, entering: Tensor) -> Tensor:
    """Fill a pair of convolutions with the channels that enter it; those that leave it."""
    new_layers, old_layers = (one.inner if _residual(one) else one for one in (new, old))
    (first, norm1), (second, norm2) = ((old_layers[at], old_layers[at + 1]) for at in (0, 3))
    middle = _strongest(_scale(first, norm1), new_layers[0].out_channels)
    scale = _scale(second, norm2)
    if _residual(old) and isinstance(old.short, nn.Conv2d):
        scale = scale + _scale(old.short)
    leaving = _strongest(scale, new_layers[3].out_channels)
    if _residual(old):
        if type(new.short) is not type(old.short):
            raise PruneError("Pruning makes two levels equally wide, which a residual block joins; take another share.")
        if isinstance(old.short, nn.Conv2d):
            _copy(new.short, old.short, leaving, entering)
        else:
            leaving = entering
    _copy(new_layers[0], first, middle, entering)
    _copy(new_layers[1], norm1, middle)
    _copy(new_layers[3], second, leaving, middle)
    _copy(new_layers[4], norm2, leaving)
    return leaving


def _gate(new: Any, old: Any, skip: Tensor, risen: Tensor) -> None:
    inner = _strongest(old.weight.weight[0, :, 0, 0].abs(), new.skip.out_channels)
    _copy(new.skip, old.skip, inner, skip)
    _copy(new.signal, old.signal, inner, risen)
    _copy(new.weight, old.weight, torch.arange(1), inner)


def _residual(block: Any) -> bool:
    return hasattr(block, "short")


def _scale(layer: Any, norm: Any = None) -> Tensor:
    """How much each channel that leaves the layer matters."""
    scale = getattr(norm, "weight", None)
    if isinstance(scale, Tensor):
        return scale.abs()
    weight = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
    strength: Tensor = torch.linalg.vector_norm(torch.as_tensor(weight).flatten(1), dim=1)
    return strength


def _strongest(scale: Tensor, count: int) -> Tensor:
    """The channels with the largest scale, in their order."""
    return torch.sort(scale.argsort(descending=True, stable=True)[:count]).values


def _copy(new: Any, old: Any, leaving: Tensor, entering: Tensor | None = None) -> None:
    """Fill a layer with the channels of another; norms have no `entering` ones."""
    for name, tensor in old.state_dict().items():
        if tensor.ndim == 0:
            chosen = tensor
        elif tensor.ndim == 1 or entering is None:
            chosen = tensor[leaving]
        elif isinstance(old, nn.ConvTranspose2d):
            chosen = tensor[entering][:, leaving]
        else:
            chosen = tensor[leaving][:, entering]
        new.state_dict()[name].copy_(chosen)
