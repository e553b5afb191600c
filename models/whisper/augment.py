"""What is done to an utterance of training only, so that a small network doesn't learn its voice by heart."""

import numpy as np
from numpy.typing import NDArray
from transformers.audio_utils import hertz_to_mel, mel_to_hertz

from models.whisper.config import AugmentConfig

Array = NDArray[np.float32]
HIGHEST_HZ = 8000.0
"""Of Whisper's features, whatever the sample rate."""


def disturb(wave: Array, config: AugmentConfig, rng: np.random.Generator) -> Array:
    """Change the speed (and with it pitch and formants) of float32[N] samples and add white noise."""
    factor = 1 + rng.uniform(-config.speed, config.speed)
    places = np.arange(0, len(wave) - 1, factor)
    faster = np.interp(places, np.arange(len(wave)), wave)
    level = float(np.sqrt(np.mean(np.square(faster)))) * 10 ** ((config.noise_db - rng.uniform(0, 30)) / 20)
    return np.asarray(faster + rng.normal(0, level, len(faster)), np.float32)


def distort(mel_FT: Array, frames: int, config: AugmentConfig, rng: np.random.Generator) -> Array:
    """Change log-mel features: another vocal tract, another microphone, and what is hidden by the mean.

    The frequencies are warped as a vocal tract of another length does (Jaitly and Hinton, 2013), the spectrum is
    tilted, and bands of bins and spans of the first `frames` are hidden as by SpecAugment (Park et al., 2019).
    """
    heard = _warped(mel_FT, 1 + rng.uniform(-config.warp, config.warp)) if config.warp else mel_FT.copy()
    bins = len(heard)
    heard += np.linspace(-1, 1, bins, dtype=np.float32)[:, None] * np.float32(rng.uniform(-config.tilt, config.tilt))
    fill = heard[:, :frames].mean() if frames else np.float32(0)
    for _ in range(config.masks):
        low, width = _span(bins, config.mask_share, rng)
        heard[low : low + width] = fill
        start, length = _span(frames, config.mask_share, rng)
        heard[:, start : start + length] = fill
    return heard


def _warped(mel_FT: Array, factor: float) -> Array:
    """Every bin as it would be with all frequencies divided by the factor."""
    bins = len(mel_FT)
    mel = np.linspace(0, hertz_to_mel(HIGHEST_HZ, mel_scale="slaney"), bins + 2)[1:-1]
    hz = mel_to_hertz(mel, mel_scale="slaney")
    places = np.interp(factor * hz, hz, np.arange(bins))
    lower = np.minimum(places.astype(int), bins - 2)
    share_F1 = (places - lower)[:, None].astype(np.float32)
    return np.asarray((1 - share_F1) * mel_FT[lower] + share_F1 * mel_FT[lower + 1], np.float32)


def _span(size: int, share: float, rng: np.random.Generator) -> tuple[int, int]:
    width = int(rng.integers(0, round(size * share) + 1))
    return int(rng.integers(0, size - width + 1)), width
