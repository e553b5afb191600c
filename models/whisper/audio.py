"""Uploaded or stored audio as mono samples at the rate that a network wants."""

import io
from math import gcd

import numpy as np
import soundfile
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d
from scipy.signal import resample_poly

_PAUSE_S = 0.1


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


def quiet_cuts(wave: NDArray[np.float32], sample_rate_hz: int, longest: int, margin: int = 0) -> list[int]:
    """The samples at which to cut float32[N], ascending: the quietest moments that leave no piece too long.

    Each cut lies in the later half of what its piece may hold, as late as possible where all is equally quiet. A piece
    of `longest` samples includes `margin` beyond each of its cuts, which its neighbours hold as well.
    """
    cuts: list[int] = []
    start = cut = 0
    while len(wave) - start > longest:
        latest = start + longest - margin
        cut = _quietest(wave, (cut + latest) // 2, latest, round(_PAUSE_S * sample_rate_hz))
        cuts.append(cut)
        start = cut - margin
    return cuts


def _quietest(wave: NDArray[np.float32], first: int, last: int, width: int) -> int:
    """The sample from `first` to `last` around which `width` samples have least power, the last one of equals."""
    start = max(0, first - width)
    power = uniform_filter1d(np.square(wave[start : last + width], dtype=np.float64), width)[first - start :]
    return last - int(np.argmin(power[last - first :: -1]))
