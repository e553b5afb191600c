"""Speckle filters and contrast for grey images, float32[H, W] in [0, 1], each with a window round every pixel.

Speckle is multiplicative: where an image is homogeneous, its standard deviation is a fixed fraction of its mean, the
coefficient of variation of the noise. Lee, Kuan and Frost smooth where the local coefficient is as small as that, and
leave the image alone where it is larger, at edges. At the borders the image is mirrored.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import convolve, uniform_filter
from skimage.exposure import equalize_adapthist
from skimage.restoration import denoise_nl_means

from models.segmentation.config import Clahe, Frost, Kuan, Lee, NonLocalMeans, Step
from models.segmentation.scans import Image

Floats = NDArray[np.float64]
_TINY = 1e-12
_LAPLACIANS = np.array([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]])


def apply(step: Step, image: Image) -> Image:
    """Apply one named step."""
    if isinstance(step, Lee):
        return lee(image, step.window_px, step.noise)
    if isinstance(step, Kuan):
        return kuan(image, step.window_px, step.noise)
    if isinstance(step, Frost):
        return frost(image, step.window_px, step.damping)
    if isinstance(step, NonLocalMeans):
        return non_local_means(image, step)
    return clahe(image, step)


def lee(image: Image, window_px: int, noise: float | None = None) -> Image:
    """Mean + (1 - noise^2 / variation^2) * (pixel - mean), the weight cut at 0 (Lee, 1980)."""
    mean, variation2 = _moments(image, window_px)
    weight = 1 - _noise2(variation2, noise) / np.maximum(variation2, _TINY)
    return _mixed(image, mean, weight)


def kuan(image: Image, window_px: int, noise: float | None = None) -> Image:
    """As Lee, with the weight divided by 1 + noise^2 (Kuan et al., 1985)."""
    mean, variation2 = _moments(image, window_px)
    noise2 = _noise2(variation2, noise)
    weight = (1 - noise2 / np.maximum(variation2, _TINY)) / (1 + noise2)
    return _mixed(image, mean, weight)


def frost(image: Image, window_px: int, damping: float) -> Image:
    """Weights exp(-damping * variation^2 * distance) in the window, normalised (Frost et al., 1982)."""
    _, variation2 = _moments(image, window_px)
    half = window_px // 2
    padded = np.pad(image.astype(np.float64), half, mode="symmetric")
    total, weights = np.zeros(image.shape), np.zeros(image.shape)
    for down in range(-half, half + 1):
        for across in range(-half, half + 1):
            weight = np.exp(-damping * variation2 * np.hypot(down, across))
            top, left = half + down, half + across
            total += weight * padded[top : top + image.shape[0], left : left + image.shape[1]]
            weights += weight
    return np.asarray(total / weights, np.float32)


def non_local_means(image: Image, step: NonLocalMeans) -> Image:
    """The mean of pixels whose patches look alike (Buades et al., 2005), by scikit-image."""
    sigma = max(noise_deviation(image), 1e-6)
    found = denoise_nl_means(
        image,
        patch_size=step.patch_px,
        patch_distance=step.distance_px,
        h=step.strength * sigma,
        sigma=sigma,
        fast_mode=True,
    )
    return np.asarray(found, np.float32)


def noise_deviation(image: Image) -> float:
    """Standard deviation of additive noise, from the difference of two Laplacians (Immerkaer, 1996)."""
    return float(np.sqrt(np.pi / 2) * np.abs(convolve(image.astype(np.float64), _LAPLACIANS)).mean() / 6)


def clahe(image: Image, step: Clahe) -> Image:
    """Histograms equalised tile by tile with limited contrast, by scikit-image."""
    tile = tuple(max(1, side // step.tiles) for side in image.shape)
    return np.asarray(equalize_adapthist(np.clip(image, 0, 1), kernel_size=tile, clip_limit=step.clip), np.float32)


def _moments(image: Image, window_px: int) -> tuple[Floats, Floats]:
    """Mean and squared coefficient of variation of each pixel's window."""
    values = image.astype(np.float64)
    mean = uniform_filter(values, window_px, mode="reflect")
    variance = np.maximum(uniform_filter(values**2, window_px, mode="reflect") - mean**2, 0)
    return mean, variance / np.maximum(mean**2, _TINY)


def _noise2(variation2: Floats, noise: float | None) -> float:
    """The square of the given coefficient; without one, the median of the windows, most being homogeneous."""
    return noise**2 if noise is not None else float(np.median(variation2))


def _mixed(image: Image, mean: Floats, weight: Floats) -> Image:
    return np.asarray(mean + np.clip(weight, 0, 1) * (image - mean), np.float32)
