"""Uploaded or stored audio as mono samples at the rate that a network wants."""

import io
from math import gcd

import numpy as np
import soundfile
from numpy.typing import NDArray
from scipy.signal import resample_poly


class AudioError(ValueError):
    """Audio that can't be used, in one sentence."""


def decode(data: bytes, sample_rate_hz: int, max_seconds: float = 120.0) -> NDArray[np.float32]:
    """Decode WAV, FLAC, OGG or MP3 to float32[N] in [-1, 1], channels averaged, resampled to `sample_rate_hz`.

    The length is judged by the file's header before any sample is decoded.

    Raises:
        AudioError: empty, damaged, of an unknown format, without samples, or longer than `max_seconds`.
    """
    if not data:
        raise AudioError("The audio is empty (0 bytes); send a WAV, FLAC, OGG or MP3 file.")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate_hz = int(file.samplerate)
            if file.frames > max_seconds * rate_hz:
                raise AudioError(f"The audio lasts {file.frames / rate_hz:.1f} s; at most {max_seconds:g} s are taken.")
            samples = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise AudioError(f"The audio can't be decoded ({reason}); send a WAV, FLAC, OGG or MP3 file.") from None
    if not samples.size:
        raise AudioError("The audio holds no samples; send a recording that is longer than 0 s.")
    if not np.isfinite(samples).all():
        raise AudioError("The audio holds samples that are not finite numbers; send a sound recording.")
    return resample(samples.mean(axis=1), rate_hz, sample_rate_hz)


def resample(wave: NDArray[np.float32], from_hz: int, to_hz: int) -> NDArray[np.float32]:
    """Change the sample rate of float32[N] with an anti-aliasing polyphase filter."""
    if from_hz == to_hz:
        return wave.astype(np.float32, copy=False)
    common = gcd(from_hz, to_hz)
    return np.asarray(resample_poly(wave, to_hz // common, from_hz // common), np.float32)
