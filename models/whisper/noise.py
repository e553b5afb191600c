"""Noise and rooms for speech: three synthetic noises or a recording, mixed in at a given ratio, and reverberation.

All randomness comes from the generator that is passed in. Waves are mono samples, float32[N].
"""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfftfreq
from scipy.signal import fftconvolve, sosfilt

from models.whisper.audio import AudioError, decode

NOISES = ("wind", "traffic", "crowd")

Wave = NDArray[np.float32]
_MAX_RECORDING_S = 600.0
_SEAM_SAMPLES = 4096
_FRAME_SAMPLES = 256
_ACTIVE_DB = 30.0
_SOUND_MPS = 343.0
_VEHICLES_PER_S = 0.5
_HEARD_S = 4.0
_HARMONICS = 16
_VOICES = 12
_SYLLABLES_PER_S = (3.0, 6.0)
_F0_HZ = (90.0, 250.0)
_GLOTTIS_HZ = 100.0
_FORMANTS_HZ = np.array([[270, 2290, 3010], [390, 1990, 2550], [530, 1840, 2480], [730, 1090, 2440], [300, 870, 2240]])
"""The first three of the vowels in heed, hid, head, hod and who'd (Peterson and Barney, 1952)."""
_BANDWIDTHS_HZ = (60, 90, 150)


class NoiseError(ValueError):
    """Noise that can't be had, in one sentence."""


def synthesise_noise(kind: str, samples: int, sample_rate_hz: int, rng: np.random.Generator) -> Wave:
    """Make one of `NOISES`: float32[samples] with an RMS of 1, so most pieces pass +-1.

    Raises:
        NoiseError: an unknown kind, or a negative number of samples.
    """
    makers = {"wind": _wind, "traffic": _traffic, "crowd": _crowd}
    if kind not in makers:
        raise NoiseError(f"There is no noise {kind!r}; take one of {', '.join(NOISES)}.")
    if samples < 0:
        raise NoiseError(f"A noise can't have {samples} samples; ask for 0 or more.")
    enough = next_fast_len(max(samples, sample_rate_hz), real=True)
    return _unit(makers[kind](enough, sample_rate_hz, rng)[:samples])


def load_noise(path: Path, sample_rate_hz: int) -> Wave:
    """Read a recording of noise of at most ten minutes: float32[N] at `sample_rate_hz` with an RMS of 1.

    Raises:
        NoiseError: a file that can't be read or decoded, is too long, or is silent throughout.
    """
    try:
        wave = decode(path.read_bytes(), sample_rate_hz, _MAX_RECORDING_S)
    except (OSError, AudioError) as error:
        raise NoiseError(f"The noise {path} can't be used: {error}") from None
    if not wave.any():
        raise NoiseError(f"The noise {path} is silent; take a recording with sound in it.")
    return _unit(wave)


def cut(noise: Wave, samples: int, rng: np.random.Generator) -> Wave:
    """Take a random piece float32[samples]; too short a noise goes round, its end faded into its start.

    Raises:
        NoiseError: a noise without samples.
    """
    if not len(noise):
        raise NoiseError("A noise without samples can't be cut; take a recording that is longer than 0 s.")
    if len(noise) >= samples:
        start = int(rng.integers(len(noise) - samples + 1))
        return noise[start : start + samples].copy()
    seam = min(len(noise) // 4, _SEAM_SAMPLES)
    angle = np.linspace(0, np.pi / 2, seam, dtype=np.float32)
    loop = noise[: len(noise) - seam].copy()
    loop[:seam] = np.sin(angle) * noise[:seam] + np.cos(angle) * noise[len(noise) - seam :]
    start = int(rng.integers(len(loop)))
    return loop.take(np.arange(start, start + samples), mode="wrap")


def mix(speech: Wave, noise: Wave, snr_db: float) -> Wave:
    """Add noise to speech of the same length so that 10 log10(P_speech / P_noise) is `snr_db`.

    The power of the noise is that of all samples, the power of the speech that of its active part: the frames of 256
    samples within 30 dB of the loudest one, which approximates the active speech level of ITU-T P.56. A sum that
    passes +-1 is scaled down as a whole. Where the speech or the noise is silent, no scale gives the ratio, and the
    speech comes back unchanged.

    Raises:
        NoiseError: a noise of another length.
    """
    if len(speech) != len(noise):
        raise NoiseError(f"Noise of {len(noise)} samples doesn't fit speech of {len(speech)}; cut it to that length.")
    speech_power, noise_power = _active_power(speech), _power(noise)
    if not speech_power or not noise_power:
        return speech
    gain = math.sqrt(speech_power / noise_power) * 10 ** (-snr_db / 20)
    mixed = speech + gain * noise.astype(np.float64)
    return np.asarray(mixed / max(1.0, np.abs(mixed).max()), np.float32)


def reverberate(speech: Wave, sample_rate_hz: int, rt60_s: float, rng: np.random.Generator) -> Wave:
    """Play speech in a room whose sound decays by 60 dB in `rt60_s` seconds; length and active level stay.

    The impulse response is Polack's (1988): the direct path at sample 0, then exponentially decaying Gaussian noise,
    here with as much energy as the direct path has. What rings after the last sample is dropped. Peaks may pass +-1.

    Raises:
        NoiseError: an `rt60_s` that is no positive number.
    """
    if not 0 < rt60_s < math.inf:
        raise NoiseError(f"A room can't have a reverberation time of {rt60_s} s; give a positive number.")
    level = _active_power(speech)
    if not level:
        return speech
    decay = 10 ** (-3 / (rt60_s * sample_rate_hz))
    places = np.arange(1, math.ceil(min(len(speech), rt60_s * sample_rate_hz)))
    tail = math.sqrt(1 - decay**2) * rng.standard_normal(len(places)) * decay ** (places - 1)
    heard = fftconvolve(speech, np.concatenate([[1.0], tail]))[: len(speech)]
    return np.asarray(heard * math.sqrt(level / _active_power(heard)), np.float32)


def _wind(samples: int, rate_hz: int, rng: np.random.Generator) -> Wave:
    """Turbulence in slow gusts; in the strongest ones the microphone rumbles and overloads."""
    hz = _frequencies(samples, rate_hz)
    gusts = np.exp(0.7 * _unit(_shaped(1 / (1 + (hz / 0.5) ** 2), samples, rng)))
    turbulence = _unit(_shaped(hz**2 / (hz**2 + 30**2) / (1 + (hz / 120) ** 2), samples, rng))
    rumble = _unit(_shaped(1 / (1 + (hz / 40) ** 4), samples, rng))
    bursts = np.maximum(gusts / np.quantile(gusts, 0.8) - 1, 0)
    return _unit(np.tanh((gusts * turbulence + 4 * bursts * rumble) / 4))


def _traffic(samples: int, rate_hz: int, rng: np.random.Generator) -> Wave:
    """Vehicles that drive past: engines, whose pitch falls with the Doppler effect, and tyres over a distant rumble."""
    hz = _frequencies(samples, rate_hz)
    engines, tyres = np.zeros(samples, np.float32), np.full(samples, 0.02, np.float32)
    times = np.arange(samples, dtype=np.float32) / rate_hz
    for passing_s in rng.uniform(-1, times[-1] + 1, 1 + rng.poisson(_VEHICLES_PER_S * times[-1])):
        first, last = (max(0, int(rate_hz * (passing_s + reach))) for reach in (-_HEARD_S, _HEARD_S))
        since_s = times[first:last] - np.float32(passing_s)
        nearest_m, speed_mps, firing_hz = rng.uniform(4, 12), rng.uniform(8, 25), rng.uniform(30, 110)
        away_m = np.sqrt(nearest_m**2 + (speed_mps * since_s) ** 2)
        level = 4 / away_m * np.cos(np.pi / 2 * since_s / _HEARD_S) ** 2
        speeding_up = rng.uniform(-0.02, 0.04) * since_s**2
        turns = firing_hz * (since_s + speeding_up - away_m / _SOUND_MPS)
        engine = _engine(rng)
        engines[first:last] += level * engine[(turns * len(engine)).astype(np.int64) % len(engine)]
        tyres[first:last] += level**2
    hiss = _unit(_shaped(hz**2 / (hz**2 + 800**2) / (1 + (hz / 1200) ** 2), samples, rng))
    rumble = _unit(_shaped(hz / (hz + 20) / (1 + (hz / 60) ** 2), samples, rng))
    return engines + 0.8 * np.sqrt(tyres) * hiss + 0.2 * rumble


def _engine(rng: np.random.Generator) -> Wave:
    """One period of harmonics that fall by about 6 dB an octave, RMS 1."""
    harmonic = np.arange(1, _HARMONICS + 1)[:, None]
    amplitudes, phases = rng.uniform(0.3, 1, harmonic.shape) / harmonic, rng.uniform(0, 1, harmonic.shape)
    turns = np.arange(1024) / 1024
    return _unit(np.sum(amplitudes * np.sin(2 * np.pi * (harmonic * turns + phases)), axis=0))


def _crowd(samples: int, rate_hz: int, rng: np.random.Generator) -> Wave:
    """Voices at several distances, each glottal pulse through the formants of its syllable, over a diffuse murmur.

    The murmur has the long-term spectrum of speech, about flat up to 500 Hz (Byrne et al., 1994).
    """
    hz = _frequencies(samples, rate_hz)
    each = (_VOICES, 1)
    f0_hz, pulse = rng.uniform(*_F0_HZ, each), np.arange(int(1.3 * _F0_HZ[1] * samples / rate_hz) + 1)
    melody = 1 + 0.15 * np.sin(2 * np.pi * (rng.uniform(0.2, 0.6, each) * pulse / f0_hz + rng.uniform(0, 1, each)))
    times = np.cumsum(1 / (f0_hz * melody), axis=1)
    position = times * rng.uniform(*_SYLLABLES_PER_S, each) + rng.uniform(0, 1, each)
    syllable = position.astype(np.int64)
    spoken = (_VOICES, int(syllable.max()) + 1)
    loudness = rng.uniform(0.3, 1, spoken) * (rng.uniform(0, 1, spoken) > 0.25) * 10 ** rng.normal(0, 0.25, each)
    vowels = np.take_along_axis(rng.integers(len(_FORMANTS_HZ), size=spoken), syllable, 1)
    strength = np.take_along_axis(loudness, syllable, 1) * np.sin(np.pi * position) ** 2
    place = (times * rate_hz).astype(np.int64)
    voices = np.zeros(samples, np.float32)
    for vowel, formants_hz in enumerate(_FORMANTS_HZ):
        now = (vowels == vowel) & (place < samples)
        pulses = np.bincount(place[now], strength[now], samples).astype(np.float32)
        voices += sosfilt(_vocal_tract(formants_hz * rng.uniform(0.95, 1.2), rate_hz), pulses)
    murmur = _shaped(hz**2 / (hz**2 + 100**2) / (1 + (hz / 500) ** 1.5), samples, rng)
    return _unit(voices) + 0.4 * _unit(murmur)


def _vocal_tract(formants_hz: NDArray[np.floating], rate_hz: int) -> NDArray[np.float32]:
    """Second-order sections of Klatt's (1980) resonators in series, after a glottis that falls by 6 dB an octave."""
    glottis = math.exp(-2 * np.pi * _GLOTTIS_HZ / rate_hz)
    sections = [[1, -1, 0, 1, -2 * glottis, glottis**2]]
    for formant_hz, width_hz in zip(formants_hz, _BANDWIDTHS_HZ, strict=True):
        radius = math.exp(-np.pi * width_hz / rate_hz)
        turn, square = -2 * radius * math.cos(2 * np.pi * formant_hz / rate_hz), radius**2
        sections.append([1 + turn + square, 0, 0, 1, turn, square])
    return np.array(sections, np.float32)


def _frequencies(samples: int, rate_hz: int) -> NDArray[np.float32]:
    """The frequencies of a real transform, in Hz."""
    return np.asarray(rfftfreq(samples, 1 / rate_hz), np.float32)


def _shaped(gain: NDArray[np.floating], samples: int, rng: np.random.Generator) -> Wave:
    """Gaussian noise with an amplitude for each frequency of `_frequencies`, and no mean."""
    real, imaginary = rng.standard_normal((2, len(gain)), np.float32)
    spectrum = gain * (real + 1j * imaginary)
    spectrum[0] = 0
    return np.asarray(irfft(spectrum, samples), np.float32)


def _unit(wave: NDArray[np.floating]) -> Wave:
    """Scale to an RMS of 1; silence stays silence."""
    return np.asarray(wave / (math.sqrt(_power(wave)) or 1.0), np.float32)


def _power(wave: NDArray[np.floating]) -> float:
    """The mean square; 0 for no samples."""
    return float(np.mean(np.square(wave, dtype=np.float64))) if len(wave) else 0.0


def _active_power(wave: NDArray[np.floating]) -> float:
    """The mean square of the frames within 30 dB of the loudest frame."""
    if not len(wave):
        return 0.0
    starts = np.arange(0, len(wave), _FRAME_SAMPLES)
    lengths = np.diff(starts, append=len(wave))
    energies = np.add.reduceat(np.square(wave, dtype=np.float64), starts)
    powers = energies / lengths
    active = powers >= powers.max() * 10 ** (-_ACTIVE_DB / 10)
    return float(energies[active].sum() / lengths[active].sum())
