"""A trained U-Net in a folder: load it and find lesions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from skimage.filters import apply_hysteresis_threshold
from torch import nn

from models.predictor import DESCRIPTION, PredictorError, describe
from models.segmentation.config import NetworkConfig, PreprocessConfig
from models.segmentation.network import UNet
from models.segmentation.preprocess import normalise, prepare, restore
from models.segmentation.scans import DataError, Image, Mask

WEIGHTS = "weights.pt"
_AT_ONCE = 16


@dataclass(frozen=True)
class Segmented:
    """What was found in one image, [H, W]: the probability of each pixel, and the mask of `spots`."""

    probability: Image
    mask: Mask


class SegmentationPredictor:
    """Finds lesions in batches of images of any size; not safe for threads."""

    task = "segmentation"

    def __init__(
        self,
        network: nn.Module,
        size: NetworkConfig,
        preprocess: PreprocessConfig,
        *,
        threshold: float = 0.5,
        peak: float = 0.0,
        flip: bool = False,
        device: str = "cpu",
    ) -> None:
        self.network = network.to(device).eval()
        self.size, self.preprocess = size, preprocess
        self.threshold, self.peak, self.flip = threshold, peak, flip
        self._device = device

    def segment(self, images: Sequence[Image]) -> list[Segmented]:
        """Masks of grey images float32[H, W] in [0, 1], in order, each at its image's size.

        Raises:
            DataError: one has another number of dimensions, no pixel, or values outside [0, 1].
        """
        for image in images:
            _check(image)
        prepared = [prepare(image, self.preprocess) for image in images]
        found = []
        for image, square in zip(images, self.probabilities(prepared), strict=True):
            probability = restore(square, (image.shape[0], image.shape[1]), self.preprocess)
            found.append(Segmented(probability, spots(probability, self.threshold, self.peak)))
        return found

    def probabilities(self, prepared: Sequence[Image]) -> list[Image]:
        """Probabilities [S, S] of images that `prepare` has made."""
        found: list[Image] = []
        for first in range(0, len(prepared), _AT_ONCE):
            part = [normalise(image, self.preprocess) for image in prepared[first : first + _AT_ONCE]]
            image_B1HW = torch.from_numpy(np.stack(part)[:, None]).to(self._device)
            with torch.no_grad():
                probability = self.network(image_B1HW).sigmoid()
                if self.flip:
                    mirrored = self.network(image_B1HW.flip(-1)).sigmoid().flip(-1)
                    probability = (probability + mirrored) / 2
            found += list(probability[:, 0].float().cpu().numpy())
        return found

    def save(self, folder: Path) -> None:
        """Write everything that `load` needs."""
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.network.state_dict(), folder / WEIGHTS)
        description = {
            "task": self.task,
            "network": self.size.model_dump(),
            "preprocess": self.preprocess.model_dump(),
            "threshold": self.threshold,
            "peak": self.peak,
            "flip": self.flip,
        }
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")


def spots(probability: Image, threshold: float, peak: float) -> Mask:
    """Pixels from the threshold on, in connected spots that somewhere exceed the peak (hysteresis, Canny, 1986)."""
    if peak <= threshold:
        return np.asarray(probability >= threshold)
    kept = apply_hysteresis_threshold(probability, threshold, peak)  # type: ignore[no-untyped-call]
    return np.asarray(kept, np.bool_)


def build(size: NetworkConfig) -> UNet:
    """A new network of the configured shape."""
    return UNet(
        size.features,
        attention=size.attention,
        residual=size.residual,
        norm=size.norm,
        activation=size.activation,
        dropout=size.dropout,
    )


def load(folder: Path, device: str = "cpu") -> SegmentationPredictor:
    """Load what `SegmentationPredictor.save` wrote.

    Raises:
        PredictorError: the folder holds no such model, or a damaged one.
    """
    description = describe(folder)
    try:
        size = NetworkConfig.model_validate(description["network"])
        preprocess = PreprocessConfig.model_validate(description["preprocess"])
        network = build(size)
        network.load_state_dict(torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True))
        threshold, peak = float(str(description["threshold"])), float(str(description["peak"]))
        flip = bool(description["flip"])
    except (OSError, KeyError, ValueError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PredictorError(f"{folder}: holds no segmentation model ({type(error).__name__}: {reason}).") from None
    return SegmentationPredictor(network, size, preprocess, threshold=threshold, peak=peak, flip=flip, device=device)


def _check(image: Image) -> None:
    if image.ndim != 2 or not image.size:
        raise DataError(f"An image must be grey and hold pixels, [H, W], not {image.shape}.")
    if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
        raise DataError("An image must hold brightnesses from 0 to 1.")
