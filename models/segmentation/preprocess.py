"""From a picture of any size to what a network sees, and from its answer back to the picture's size."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pictures
from scipy.ndimage import affine_transform

from models.segmentation import filters
from models.segmentation.config import AugmentConfig, PreprocessConfig
from models.segmentation.scans import Image, Mask


def prepare(image: Image, config: PreprocessConfig) -> Image:
    """Filter and resize [H, W] to [S, S] in [0, 1]; `normalise` follows, after what training augments."""
    for step in config.steps:
        image = filters.apply(step, image)
    return np.clip(_resized(image, config, Pictures.Resampling.BILINEAR), 0, 1)


def prepare_mask(mask: Mask, config: PreprocessConfig) -> Mask:
    """A mask as `prepare` places its image."""
    return _resized(mask.astype(np.float32), config, Pictures.Resampling.BOX) >= 0.5


def restore(probability: Image, shape: tuple[int, int], config: PreprocessConfig) -> Image:
    """A probability [S, S] at the size (H, W) of the picture that `prepare` was given."""
    if config.resize == "pad":
        top, left, height, width = _place(shape, config.size_px)
        probability = probability[top : top + height, left : left + width]
    return _scaled(probability, shape, Pictures.Resampling.BILINEAR)


def normalise(image: Image, config: PreprocessConfig) -> Image:
    """Set the range of values; an image of one single grey becomes 0."""
    if config.normalise == "none":
        return image
    low, span = (image.mean(), image.std()) if config.normalise == "zscore" else (image.min(), np.ptp(image))
    return np.asarray((image - low) / max(float(span), 1e-6), np.float32)


def augment(image: Image, mask: Mask, config: AugmentConfig, rng: np.random.Generator) -> tuple[Image, Mask]:
    """Change a prepared image and its mask as the generator says."""
    angle = np.deg2rad(rng.uniform(-config.rotate_deg, config.rotate_deg))
    factor = 1 + rng.uniform(-config.scale, config.scale)
    moved = rng.uniform(-config.shift, config.shift, 2) * len(image)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / factor
    if config.flip and rng.random() < 0.5:
        matrix[:, 1] *= -1
    middle = (np.array(image.shape) - 1) / 2
    offset = middle - matrix @ (middle + moved)
    warped = affine_transform(image, matrix, offset, order=1, mode="constant")
    found = affine_transform(mask.astype(np.float32), matrix, offset, order=1, mode="constant") >= 0.5
    warped = warped ** np.exp(rng.uniform(-config.gamma, config.gamma)) * (1 + rng.uniform(-config.gain, config.gain))
    warped = warped * (1 + rng.normal(0, config.speckle, image.shape))
    return np.asarray(np.clip(warped, 0, 1), np.float32), found


def _resized(image: Image, config: PreprocessConfig, how: Pictures.Resampling) -> Image:
    if config.resize == "stretch":
        return _scaled(image, (config.size_px, config.size_px), how)
    top, left, height, width = _place((image.shape[0], image.shape[1]), config.size_px)
    square: Image = np.zeros((config.size_px, config.size_px), np.float32)
    square[top : top + height, left : left + width] = _scaled(image, (height, width), how)
    return square


def _place(shape: tuple[int, int], size_px: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a picture within the square."""
    height, width = (max(1, round(side * size_px / max(shape))) for side in shape)
    return (size_px - height) // 2, (size_px - width) // 2, height, width


def _scaled(image: NDArray[np.float32], shape: tuple[int, int], how: Pictures.Resampling) -> Image:
    if image.shape == shape:
        return image
    return np.asarray(Pictures.fromarray(np.ascontiguousarray(image)).resize(shape[::-1], how), np.float32)
