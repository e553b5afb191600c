"""A U-Net (Ronneberger et al., 2015) with attention gates and residual blocks by choice.

Each level halves the sides, and its decoder doubles them again by a transposed convolution; so the skip of a level has
exactly the size of its decoder where the sides are multiples of 2^levels. Other sizes are refused: an interpolation
that made them fit would also hide a wrong pooling.

Shapes: B images, C channels, H x W pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class NetworkError(ValueError):
    """An input that the network doesn't take, in one sentence."""


class UNet(nn.Module):
    """Grey images float32[B, 1, H, W] to logits of the same shape."""

    def __init__(
        self,
        features: Sequence[int] = (64, 128, 256, 512),
        *,
        attention: bool = False,
        residual: bool = False,
        norm: str = "batch",
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.multiple = 2 ** len(features)
        widths = [1, *features]
        block = _Residual if residual else _Pair
        self.encoders = nn.ModuleList(
            block(before, after, norm, activation) for before, after in zip(widths, features, strict=False)
        )
        self.lowest = block(features[-1], 2 * features[-1], norm, activation)
        self.dropout = nn.Dropout2d(dropout)
        below = [*features[1:], 2 * features[-1]]
        self.rises = nn.ModuleList(
            nn.ConvTranspose2d(deep, width, 2, stride=2) for deep, width in zip(below, features, strict=True)
        )
        self.gates = nn.ModuleList(_Gate(width) if attention else nn.Identity() for width in features)
        self.decoders = nn.ModuleList(block(2 * width, width, norm, activation) for width in features)
        self.attention = attention
        self.last = nn.Conv2d(features[0], 1, 1)

    def forward(self, image_B1HW: Tensor) -> Tensor:
        """Logits; raises NetworkError for sides that are no multiple of `self.multiple`."""
        if not torch.compiler.is_compiling():
            self._check(image_B1HW)
        x = image_B1HW
        skips: list[Tensor] = []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.dropout(self.lowest(x))
        for level in reversed(range(len(skips))):
            x = self.rises[level](x)
            skip = self.gates[level](skips[level], x) if self.attention else skips[level]
            x = self.decoders[level](torch.cat([skip, x], dim=1))
        return self.last(x)  # type: ignore[no-any-return]

    def _check(self, image: Tensor) -> None:
        if image.ndim != 4 or image.shape[1] != 1:
            raise NetworkError(f"The network takes grey images [B, 1, H, W], not {tuple(image.shape)}.")
        if any(side == 0 or side % self.multiple for side in image.shape[2:]):
            raise NetworkError(
                f"An image of {image.shape[2]} x {image.shape[3]} pixels can't be halved {len(self.encoders)} times; "
                f"resize or pad its sides to multiples of {self.multiple}."
            )


def segmentation_loss(logits_B1HW: Tensor, truth_B1HW: Tensor, dice: float, bce: float) -> Tensor:
    """Each image's weighted soft Dice loss and mean binary cross-entropy, [B].

    One pixel is added to both sides of the fraction, so that an empty mask pulls all probabilities to 0.
    """
    probability = logits_B1HW.sigmoid()
    both = (probability * truth_B1HW).sum(dim=(1, 2, 3))
    total = probability.sum(dim=(1, 2, 3)) + truth_B1HW.sum(dim=(1, 2, 3))
    entropy = nn.functional.binary_cross_entropy_with_logits(logits_B1HW, truth_B1HW, reduction="none")
    return dice * (1 - (2 * both + 1) / (total + 1)) + bce * entropy.mean(dim=(1, 2, 3))


class _Pair(nn.Sequential):
    """Two convolutions of 3 x 3, each normalised and activated."""

    def __init__(self, before: int, after: int, norm: str, activation: str) -> None:
        super().__init__(
            nn.Conv2d(before, after, 3, padding=1, bias=norm == "none"),
            _norm(norm, after),
            _activation(activation),
            nn.Conv2d(after, after, 3, padding=1, bias=norm == "none"),
            _norm(norm, after),
            _activation(activation),
        )


class _Residual(nn.Module):
    """The same two, with the input added before the last activation."""

    def __init__(self, before: int, after: int, norm: str, activation: str) -> None:
        super().__init__()
        *inner, self.activation = _Pair(before, after, norm, activation)
        self.inner = nn.Sequential(*inner)
        self.short = nn.Conv2d(before, after, 1, bias=False) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.inner(x) + self.short(x))  # type: ignore[no-any-return]


class _Gate(nn.Module):
    """Weighs each pixel of a skip by what the level below makes of it; both have the same shape [B, C, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(1, width // 2)
        self.skip = nn.Conv2d(width, inner, 1)
        self.signal = nn.Conv2d(width, inner, 1, bias=False)
        self.weight = nn.Conv2d(inner, 1, 1)

    def forward(self, skip: Tensor, signal: Tensor) -> Tensor:
        return skip * self.weight(torch.relu(self.skip(skip) + self.signal(signal))).sigmoid()  # type: ignore[no-any-return]


def _norm(name: str, width: int) -> nn.Module:
    if name == "batch":
        return nn.BatchNorm2d(width)
    if name == "instance":
        return nn.InstanceNorm2d(width, affine=True)
    if name == "group":
        return nn.GroupNorm(4, width)
    return nn.Identity()


def _activation(name: str) -> nn.Module:
    if name == "relu":
        return nn.ReLU(inplace=True)
    if name == "leaky_relu":
        return nn.LeakyReLU(0.1, inplace=True)
    return nn.SiLU(inplace=True) if name == "silu" else nn.GELU()
