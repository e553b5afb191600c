"""What can be done to a wave before it is recognised: less noise, no pauses at its ends, a common colour and level.

Nothing here knows the noise or the microphone in advance: the noise is learnt from where the wave is quietest, the
colour from where it is loud. Waves are mono, float32[N].
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy.ndimage import percentile_filter, uniform_filter
from scipy.signal import butter, istft, sosfilt, sosfilt_zi, stft

Wave = NDArray[np.float32]
Floats = NDArray[np.float64]
_TINY = 1e-20

WHISPER_RANGE_DB = 80.0

_WINDOW_S = 0.032
_SHORTEST_LEARNT_S = 0.25
_NOISE_QUANTILE = 0.2
_OVER_SUBTRACTION = 2.0
_SPECTRAL_FLOOR = 0.01
_MEMORY = 0.92
_LEAST_PRIOR_SNR = 0.01

_COLOUR_BELOW_LOUDEST_DB = 40.0
_COLOUR_BINS = 5
_LARGEST_GAIN_DB = 20.0

_STEP_S = 0.01
_SPEECH_BAND_HZ = (150.0, 4000.0)
_FLOOR_SPAN_S = 10.0
_FLOOR_PERCENTILE = 10
_ABOVE_FLOOR_DB = 5.0
_BELOW_LOUDEST_DB = 40.0
_INAUDIBLE_POWER = 1e-10
"""About the rounding noise of 16 bits."""
_HANGOVER_S = 0.2
_SHORTEST_SPEECH_S = 0.04
_MARGIN_S = 0.1


class PreprocessConfig(BaseModel):
    """Which steps are taken, in the order denoise, trim, equalise, normalise; by default none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    denoise: Literal["none", "spectral", "wiener"] = "none"
    """`spectral`: over-subtraction of the noise's power (Boll, 1979; Berouti et al., 1979). `wiener`: a Wiener filter
    with the decision-directed estimate of the speech (Ephraim and Malah, 1984; Scalart and Filho, 1996)."""
    equalise: bool = False
    """Give the recording the mean spectrum of speech, so that its microphone and line are not heard."""
    normalise: Literal["none", "rms", "peak"] = "none"
    """What is brought to `level_db`: the root mean square or the largest sample."""
    level_db: float = Field(-20.0, ge=-100, le=0)
    """In dB of full scale."""
    range_db: float = Field(WHISPER_RANGE_DB, gt=0, le=WHISPER_RANGE_DB)
    """How far below the loudest moment and frequency sound is heard: a smaller range hides the noise of a recording."""
    lifter_ms: float | None = Field(None, gt=0, le=16)
    """Smooth the spectrum by leaving out quefrencies from here on: 2.5 ms hide the pitch of voices below 400 Hz."""
    trim: bool = False
    """Cut what is before the first and after the last speech, but for 100 ms."""

    @property
    def label(self) -> str:
        """The steps that are taken, as in `wiener and trim`; `as it is` without any."""
        switches = ("trim" if self.trim else "none", "equalise" if self.equalise else "none")
        limited = "none" if self.range_db == WHISPER_RANGE_DB else f"{self.range_db:g} dB"
        smoothed = "none" if self.lifter_ms is None else f"lifter {self.lifter_ms:g} ms"
        named = (self.denoise, *switches, self.normalise, limited, smoothed)
        return " and ".join(step for step in named if step != "none") or "as it is"


def prepare(wave: Wave, sample_rate_hz: int, config: PreprocessConfig) -> Wave:
    """Apply the configured steps to any float32[N], also an empty or a silent one.

    `range_db` and `lifter_ms` are for its features. Denoising and equalising leave waves below 250 ms as they are: they
    have too little to learn from. Trimming leaves waves without speech as they are, and only it changes the length.
    Normalising to an RMS stops where a sample reaches +-1.
    """
    if config.denoise != "none":
        wave = _denoised(wave, sample_rate_hz, config.denoise)
    if config.trim:
        wave = _trimmed(wave, sample_rate_hz)
    if config.equalise:
        wave = _equalised(wave, sample_rate_hz)
    if config.normalise != "none":
        wave = _normalised(wave, config.normalise, config.level_db)
    return wave


def speech_spans(wave: Wave, sample_rate_hz: int) -> list[tuple[float, float]]:
    """Where somebody speaks: (start, end) in seconds, ascending and apart.

    Speech is what rises 5 dB above the noise floor between 150 Hz and 4 kHz, and is at most 40 dB below the loudest
    10 ms. The floor is the tenth percentile of the ten seconds round about, so that it follows slow changes of the
    noise; speech must therefore pause for a tenth of the time. Pauses below 200 ms don't end a span, and sounds below
    40 ms don't start one.
    """
    if not len(wave):
        return []
    step = round(_STEP_S * sample_rate_hz)
    power = _speech_band_power(wave, sample_rate_hz, step)
    around = min(round(_FLOOR_SPAN_S / _STEP_S), len(power))
    floor = percentile_filter(power, _FLOOR_PERCENTILE, around, mode="reflect")
    least = max(_INAUDIBLE_POWER, power.max() * 10 ** (-_BELOW_LOUDEST_DB / 10))
    speech = power > np.maximum(floor * 10 ** (_ABOVE_FLOOR_DB / 10), least)
    changes = np.flatnonzero(np.diff(speech, prepend=False, append=False))
    pauses = changes[1:-1].reshape(-1, 2)
    pauses = pauses[pauses[:, 1] - pauses[:, 0] >= _HANGOVER_S / _STEP_S]
    spans = np.concatenate([changes[:1], pauses.ravel(), changes[-1:]]).reshape(-1, 2)
    spans = spans[spans[:, 1] - spans[:, 0] >= _SHORTEST_SPEECH_S / _STEP_S]
    seconds = np.minimum(spans * step, len(wave)) / sample_rate_hz
    return [(start, end) for start, end in seconds.tolist()]


def _denoised(wave: Wave, rate_hz: int, method: Literal["spectral", "wiener"]) -> Wave:
    """Scale down each frequency of each 32 ms by how much noise it has."""
    if len(wave) < _SHORTEST_LEARNT_S * rate_hz:
        return wave
    frames = _frames(rate_hz)
    _, _, spectrum_FT = stft(wave.astype(np.float64), **frames)
    power_FT = np.abs(spectrum_FT) ** 2
    noise_F1 = _noise_power(power_FT)
    gain_FT = _subtraction(power_FT, noise_F1) if method == "spectral" else _wiener(power_FT, noise_F1)
    _, denoised = istft(spectrum_FT * gain_FT, **frames)
    return np.asarray(denoised[: len(wave)], np.float32)


def _frames(rate_hz: int) -> dict[str, int]:
    """32 ms that overlap by half, as scipy takes them."""
    half = round(_WINDOW_S * rate_hz / 2)
    return {"fs": rate_hz, "nperseg": 2 * half, "noverlap": half}


def _equalised(wave: Wave, rate_hz: int) -> Wave:
    """Scale each frequency so that its mean level in the loud frames is that of average speech.

    On the wave what the subtraction of the cepstral mean is on features (Atal, 1974). Speech is about flat up to 500 Hz
    and falls from there (Byrne et al., 1994); no frequency is changed by more than 20 dB against the others, so that
    what a line doesn't carry is not made of its noise.
    """
    if len(wave) < _SHORTEST_LEARNT_S * rate_hz or not wave.any():
        return wave
    frames = _frames(rate_hz)
    hz_F, _, spectrum_FT = stft(wave.astype(np.float64), **frames)
    power_FT = np.abs(spectrum_FT) ** 2
    loudness_T = power_FT.sum(axis=0)
    loud_T = loudness_T > loudness_T.max() * 10 ** (-_COLOUR_BELOW_LOUDEST_DB / 10)
    heard_FT = power_FT[:, loud_T]
    levels_FT = 10 * np.log10(np.maximum(heard_FT, heard_FT.max() * 1e-8))
    speech_db_F = -20 * np.log10(1 + (hz_F / 500) ** 1.5)
    wanted_db_F = speech_db_F - uniform_filter(levels_FT.mean(axis=1), _COLOUR_BINS)
    gain_db_F = np.clip(wanted_db_F - np.median(wanted_db_F), -_LARGEST_GAIN_DB, _LARGEST_GAIN_DB)
    _, equalised = istft(spectrum_FT * 10 ** (gain_db_F / 20)[:, None], **frames)
    return np.asarray(equalised[: len(wave)], np.float32)


def _noise_power(power_FT: Floats) -> Floats:
    """The noise's mean power in each frequency, [F, 1], from a low quantile over time (Stahl et al., 2000).

    The power of Gaussian noise is distributed exponentially, so its quantile q is -ln(1 - q) of its mean. Digital
    silence is no noise and isn't counted.
    """
    heard = power_FT[:, power_FT.any(axis=0)]
    if not heard.size:
        return np.zeros((len(power_FT), 1))
    means = np.quantile(heard, _NOISE_QUANTILE, axis=1, keepdims=True) / -math.log(1 - _NOISE_QUANTILE)
    return np.asarray(uniform_filter(means, (5, 1)), np.float64)


def _subtraction(power_FT: Floats, noise_F1: Floats) -> Floats:
    """Gains of power subtraction; the power is smoothed first, against musical tones."""
    smooth_FT = np.maximum(uniform_filter(power_FT, 3), _TINY)
    return np.asarray(np.sqrt(np.maximum(1 - _OVER_SUBTRACTION * noise_F1 / smooth_FT, _SPECTRAL_FLOOR)))


def _wiener(power_FT: Floats, noise_F1: Floats) -> Floats:
    """Gains snr / (1 + snr), where the prior snr remembers the speech found in the frame before."""
    snr_TF = (power_FT / np.maximum(noise_F1, _TINY)).T
    gain_TF = np.empty_like(snr_TF)
    before_F = np.maximum(snr_TF[0] - 1, 0)
    for gain_F, snr_F in zip(gain_TF, snr_TF, strict=True):
        prior_F = np.maximum(_MEMORY * before_F + (1 - _MEMORY) * np.maximum(snr_F - 1, 0), _LEAST_PRIOR_SNR)
        gain_F[:] = prior_F / (1 + prior_F)
        before_F = gain_F**2 * snr_F
    return gain_TF.T


def _speech_band_power(wave: Wave, rate_hz: int, step: int) -> Floats:
    """The mean square of each `step` samples in the band of speech; the wave counts as constant before its start."""
    lowest_hz, highest_hz = _SPEECH_BAND_HZ
    band = butter(4, (lowest_hz, min(highest_hz, 0.45 * rate_hz)), "bandpass", fs=rate_hz, output="sos")
    heard, _ = sosfilt(band, wave.astype(np.float64), zi=sosfilt_zi(band) * float(wave[0]))
    starts = np.arange(0, len(wave), step)
    return np.add.reduceat(np.square(heard), starts) / np.diff(starts, append=len(wave))


def _trimmed(wave: Wave, rate_hz: int) -> Wave:
    spans = speech_spans(wave, rate_hz)
    if not spans:
        return wave
    first, last = round((spans[0][0] - _MARGIN_S) * rate_hz), round((spans[-1][1] + _MARGIN_S) * rate_hz)
    return wave[max(0, first) : last]


def _normalised(wave: Wave, measure: Literal["rms", "peak"], level_db: float) -> Wave:
    if not wave.any():
        return wave
    exact = wave.astype(np.float64)
    peak = float(np.abs(exact).max())
    present = peak if measure == "peak" else math.sqrt(np.mean(np.square(exact)))
    return np.asarray(exact * min(10 ** (level_db / 20) / present, 1 / peak), np.float32)
