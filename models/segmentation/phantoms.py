"""Procedural ultrasound images with their lesions, decided by nothing but a sample's number.

An image is a map of how strongly tissue scatters, times speckle, attenuation and shadows, compressed by a logarithm as
a scanner does. Speckle is the magnitude of a complex Gaussian field blurred by the point spread function, and so
Rayleigh distributed (Wagner et al., 1983). Lesions are dark: benign ones smooth ellipses, wider than tall, often with
brighter tissue behind them; malignant ones spiculated, taller, uneven, often with a shadow behind them. Fat lobules,
ribs and poor contact are dark as well and are no lesions, so darkness alone does not decide.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]

KINDS = ("benign", "malignant", "normal")
_SHARES = (0.45, 0.4, 0.15)
_DYNAMIC_RANGE_DB = (40.0, 55.0)


@dataclass(frozen=True)
class Phantom:
    """An image in [0, 1], where its lesion is, and its kind; a normal one has an empty mask. Arrays are [H, W]."""

    image: Image
    mask: Mask
    kind: str


def phantom(seed: int, part: int, number: int, size_px: int) -> Phantom:
    """Make one phantom; `part` keeps the numbers of different splits apart."""
    rng = np.random.default_rng([seed, part, number])
    y, x = np.mgrid[0:size_px, 0:size_px].astype(np.float32) / size_px
    kind = KINDS[int(rng.choice(3, p=_SHARES))]
    tissue = _tissue(rng, y)
    _add_lobules(rng, tissue, x, y)
    shading = np.ones_like(tissue)
    _add_ribs(rng, tissue, shading, x, y)
    mask = np.zeros(tissue.shape, bool)
    if kind != "normal":
        mask = _add_lesion(rng, kind, tissue, shading, x, y)
    for _ in range(rng.integers(0, 2)):
        _shadow(shading, x, rng.uniform(0, 1), rng.uniform(0.01, 0.05), rng.uniform(0.15, 0.6))
    attenuation = np.exp(-rng.uniform(0.1, 1.1) * y)
    return Phantom(_scan(rng, tissue * shading * attenuation), mask, kind)


def _tissue(rng: np.random.Generator, y: Image) -> Image:
    """Layers with wavy boundaries: skin, fat, gland, muscle; echo strength by layer and a slow unevenness."""
    size = len(y)
    strengths = (rng.uniform(0.8, 1.2), rng.uniform(0.2, 0.4), rng.uniform(0.4, 0.8), rng.uniform(0.2, 0.5))
    depths = np.cumsum([rng.uniform(0.02, 0.06), rng.uniform(0.08, 0.2), rng.uniform(0.4, 0.6)])
    tissue = np.full(y.shape, strengths[0], np.float32)
    for depth, strength in zip(depths, strengths[1:], strict=True):
        wave = gaussian_filter1d(rng.normal(size=size), size * 0.12, mode="reflect") * size**0.5 * 0.02
        tissue = np.where(y > depth + wave[None, :], np.float32(strength), tissue)
    uneven = gaussian_filter(rng.normal(size=y.shape), (0.03 * size, 0.07 * size))
    streaks = gaussian_filter(rng.normal(size=y.shape), (0.008 * size, 0.09 * size))
    texture = 0.25 * uneven / uneven.std() + 0.18 * streaks / streaks.std()
    return np.asarray(gaussian_filter(tissue, 0.008 * size) * np.exp(texture), np.float32)


def _add_lobules(rng: np.random.Generator, tissue: Image, x: Image, y: Image) -> None:
    for _ in range(rng.integers(0, 4)):
        centre = rng.uniform(0, 1), rng.uniform(0.05, 0.95)
        radius, angle = _ellipse(rng, centre, rng.uniform(0.04, 0.14), rng.uniform(0.3, 0.6), x, y)
        inside = 1 / (1 + np.exp((radius - 1 - 0.1 * np.sin(3 * angle)) * 8))
        tissue *= 1 - inside * rng.uniform(0.35, 0.8)


def _add_ribs(rng: np.random.Generator, tissue: Image, shading: Image, x: Image, y: Image) -> None:
    """Bright arcs with a shadow beneath, below the middle."""
    for _ in range(int(rng.choice(3, p=(0.6, 0.3, 0.1)))):
        middle, depth, half = rng.uniform(0.05, 0.95), rng.uniform(0.6, 0.85), rng.uniform(0.06, 0.14)
        arc = depth + 0.6 * (x - middle) ** 2 / half
        across = np.clip(1 - ((x - middle) / half) ** 2, 0, 1)
        tissue += 0.9 * across * np.exp(-(((y - arc) / 0.015) ** 2))
        shading *= 1 - 0.8 * np.sqrt(across) * (y > arc)


def _add_lesion(rng: np.random.Generator, kind: str, tissue: Image, shading: Image, x: Image, y: Image) -> Mask:
    """Draw a lesion and what lies behind it; the mask of its pixels."""
    malignant = kind == "malignant"
    centre = rng.uniform(0.25, 0.75), rng.uniform(0.28, 0.68)
    half = rng.uniform(0.09, 0.24)
    ratio = rng.uniform(0.75, 1.25) if malignant else rng.uniform(0.5, 0.85)
    radius, angle = _ellipse(rng, centre, half, ratio, x, y)
    edge = np.ones_like(angle)
    for order in range(2, 6):
        edge += rng.normal(0, (0.06 if malignant else 0.03) * 2 / order) * np.cos(order * angle + rng.uniform(0, 6.3))
    for _ in range(rng.integers(5, 11) if malignant else 0):
        spike = np.cos(angle - rng.uniform(0, 6.3)) - 1
        edge += rng.uniform(0.15, 0.5) * np.exp(rng.uniform(25, 80) * spike)
    mask = np.asarray(radius < edge)
    soft = gaussian_filter(mask.astype(np.float32), (0.012 if malignant else 0.006) * len(x))
    strength = rng.uniform(0.06, 0.28) if malignant else rng.uniform(0.02, 0.22)
    inside = np.full(x.shape, strength, np.float32)
    if malignant:
        blobs = gaussian_filter(rng.normal(size=x.shape), 0.03 * len(x))
        inside = np.asarray(strength * np.exp(0.35 * blobs / blobs.std()), np.float32)
    tissue *= 1 - soft + soft * inside
    behind = np.clip((y - centre[1]) / (half * ratio), 0, 1) * (1 - soft)
    across = np.exp(-(((x - centre[0]) / (0.75 * half)) ** 4))
    if malignant and rng.random() < 0.6:
        shading *= 1 - rng.uniform(0.3, 0.7) * across * behind
    elif not malignant and rng.random() < 0.7:
        shading *= 1 + rng.uniform(0.2, 0.9) * across * behind
    return mask


def _ellipse(
    rng: np.random.Generator, centre: tuple[float, float], half: float, ratio: float, x: Image, y: Image
) -> tuple[Image, Image]:
    """Distance from the centre in units of the ellipse's edge, and the angle, of every pixel."""
    tilt = rng.uniform(-0.35, 0.35)
    u = ((x - centre[0]) * np.cos(tilt) + (y - centre[1]) * np.sin(tilt)) / half
    v = (-(x - centre[0]) * np.sin(tilt) + (y - centre[1]) * np.cos(tilt)) / (half * ratio)
    return np.hypot(u, v), np.arctan2(v, u)


def _shadow(shading: Image, x: Image, middle: float, half: float, depth: float) -> None:
    shading *= 1 - depth * np.exp(-(((x - middle) / half) ** 4))


def _scan(rng: np.random.Generator, strength: Image) -> Image:
    """Speckle, logarithm, and the scanner's smoothing."""
    decibels = 20 * np.log10(np.maximum(strength * _speckle(rng, len(strength)), 1e-6))
    span = rng.uniform(*_DYNAMIC_RANGE_DB)
    white = rng.uniform(4, 16)
    image = np.clip(1 + (decibels - white) / span, 0, 1)
    return np.asarray(gaussian_filter(image, 0.4 * len(strength) / 96), np.float32)


def _speckle(rng: np.random.Generator, size_px: int) -> NDArray[np.float64]:
    """Rayleigh distributed with mean 1; finer in depth than across."""
    spread = np.array([0.6, 1.1]) * size_px / 96
    real, imaginary = (gaussian_filter(rng.normal(size=(size_px, size_px)), spread) for _ in range(2))
    magnitude = np.hypot(real, imaginary)
    return np.asarray(magnitude / magnitude.mean())
