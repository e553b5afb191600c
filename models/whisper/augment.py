"""What is done to an utterance of training only, so that a small network doesn't learn its voice by heart."""

import numpy as np
from numpy.typing import NDArray

from models.whisper.config import AugmentConfig
from models.whisper.noise import reverberate

Array = NDArray[np.float32]


def disturb(wave: Array, sample_rate_hz: int, config: AugmentConfig, rng: np.random.Generator) -> Array:
    """Change the speed (and with it pitch and formants) of float32[N] samples, play some in a room, add white noise."""
    factor = 1 + rng.uniform(-config.speed, config.speed)
    places = np.arange(0, len(wave) - 1, factor)
    faster = np.interp(places, np.arange(len(wave)), wave)
    if config.reverberant and rng.random() < config.reverberant:
        faster = reverberate(faster.astype(np.float32), sample_rate_hz, float(rng.uniform(*config.rt60_s)), rng)
    level = float(np.sqrt(np.mean(np.square(faster)))) * 10 ** ((config.noise_db - rng.uniform(0, 30)) / 20)
    return np.asarray(faster + rng.normal(0, level, len(faster)), np.float32)


def distort(mel_FT: Array, frames: int, config: AugmentConfig, rng: np.random.Generator) -> Array:
    """Change log-mel features: the tilt of another microphone's spectrum, and parts hidden by the mean.

    Bands of bins and spans of the first `frames` are hidden as by SpecAugment (Park et al., 2019).
    """
    heard = mel_FT.copy()
    bins = len(heard)
    heard += np.linspace(-1, 1, bins, dtype=np.float32)[:, None] * np.float32(rng.uniform(-config.tilt, config.tilt))
    fill = heard[:, :frames].mean() if frames else np.float32(0)
    for _ in range(config.masks):
        low, width = _span(bins, config.mask_share, rng)
        heard[low : low + width] = fill
        start, length = _span(frames, config.mask_share, rng)
        heard[:, start : start + length] = fill
    return heard


def _span(size: int, share: float, rng: np.random.Generator) -> tuple[int, int]:
    width = int(rng.integers(0, round(size * share) + 1))
    return int(rng.integers(0, size - width + 1)), width
