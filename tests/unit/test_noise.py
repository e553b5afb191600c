"""Noises for speech: what each sounds like, the ratio they are mixed in at, and the decay of rooms."""

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.whisper.noise import NOISES, NoiseError, cut, load_noise, mix, reverberate, synthesise_noise

RATE_HZ = 16000
SEEDS = st.integers(0, 2**32 - 1)
EDGES_HZ = (0, 50, 100, 200, 500, 1000, 2000, 4000, 8000)


def made(kind: str, seconds: float, seed: int) -> np.ndarray:
    return synthesise_noise(kind, int(seconds * RATE_HZ), RATE_HZ, np.random.default_rng(seed))


def power(wave: np.ndarray) -> float:
    return float(np.mean(np.square(wave, dtype=np.float64)))


def shares(wave: np.ndarray) -> np.ndarray:
    """Of the energy, in each of the bands between `EDGES_HZ`."""
    energy = np.abs(np.fft.rfft(wave)) ** 2
    sums, _ = np.histogram(np.fft.rfftfreq(len(wave), 1 / RATE_HZ), EDGES_HZ, weights=energy)
    return sums / sums.sum()


def levels(wave: np.ndarray, seconds: float) -> np.ndarray:
    """The RMS of each `seconds` of a wave."""
    step = int(seconds * RATE_HZ)
    return np.sqrt(np.mean(wave[: len(wave) // step * step].reshape(-1, step) ** 2, axis=1))


def modulation(wave: np.ndarray) -> float:
    """The relative power of the envelope between 2 and 8 Hz, where the syllables of speech are."""
    envelope = levels(wave, 0.01)
    energy = np.abs(np.fft.rfft(envelope / envelope.mean())) ** 2
    hz = np.fft.rfftfreq(len(envelope), 0.01)
    return float(energy[(hz >= 2) & (hz <= 8)].sum() / len(envelope) ** 2)


def active_power(wave: np.ndarray) -> float:
    """The loop that `mix` promises: frames of 256 samples within 30 dB of the loudest."""
    frames = [wave[first : first + 256].astype(np.float64) for first in range(0, len(wave), 256)]
    loudest = max(np.mean(frame**2) for frame in frames)
    return float(np.mean(np.concatenate([frame for frame in frames if np.mean(frame**2) >= loudest / 1000]) ** 2))


def speech(seed: int, samples: int, level: float = 0.1) -> np.ndarray:
    """Bursts of noise with pauses between them."""
    rng = np.random.default_rng(seed)
    bursts = np.repeat(rng.choice([0.001, 0.3, 1.0], samples // 1000 + 1), 1000)[:samples]
    bursts[0] = 1
    return (level * bursts * rng.normal(0, 1, samples)).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(NOISES), st.integers(1, 3 * RATE_HZ), st.sampled_from([4000, 8000, 16000, 48000]), SEEDS)
def test_a_noise_has_the_length_and_rms_asked_for_and_follows_its_generator(
    kind: str, samples: int, rate_hz: int, seed: int
) -> None:
    first, again, other = (
        synthesise_noise(kind, samples, rate_hz, np.random.default_rng(number)) for number in (seed, seed, seed + 1)
    )
    assert (first.dtype, first.shape) == (np.float32, (samples,))
    assert power(first) == pytest.approx(1, rel=1e-4)
    assert np.array_equal(first, again)
    assert samples == 1 or not np.array_equal(first, other)


@pytest.mark.parametrize("seed", range(5))
def test_wind_is_low(seed: int) -> None:
    assert shares(made("wind", 4, seed))[:4].sum() > 0.95


def test_the_strongest_gusts_rumble() -> None:
    seconds = made("wind", 60, 0).reshape(60, -1)
    by_loudness = seconds[np.argsort(levels(seconds.ravel(), 1.0))]
    below_50_hz = [shares(second)[0] for second in by_loudness]
    assert np.mean(below_50_hz[-6:]) > 1.5 * np.mean(below_50_hz[:30])


@pytest.mark.parametrize("seed", range(5))
def test_a_crowd_is_in_the_band_of_voices(seed: int) -> None:
    assert shares(made("crowd", 4, seed))[3:7].sum() > 0.85


@pytest.mark.parametrize("seed", range(5))
def test_traffic_has_engines_below_tyres(seed: int) -> None:
    below_200_hz, above_500_hz = (
        shares(made("traffic", 10, seed))[:3].sum(),
        shares(made("traffic", 10, seed))[4:].sum(),
    )
    assert below_200_hz > 0.2
    assert above_500_hz > 0.1


def test_vehicles_pass_again_and_again() -> None:
    quarters = levels(made("traffic", 60, 0), 0.5).reshape(4, -1)
    assert quarters.max(axis=1).min() > 3 * quarters.min()


def test_only_a_crowd_has_syllables() -> None:
    found = {kind: [modulation(made(kind, 6, seed)) for seed in range(4)] for kind in NOISES}
    assert min(found["crowd"]) > 1.3 * max(*found["wind"], *found["traffic"])


def test_wind_and_traffic_rise_and_fall_slowly_and_a_crowd_stays() -> None:
    def spread_db(kind: str, seed: int) -> float:
        quiet, loud = np.quantile(levels(made(kind, 20, seed), 1.0), [0.05, 0.95])
        return float(20 * np.log10(loud / quiet))

    wind, traffic, crowd = (np.median([spread_db(kind, seed) for seed in range(3)]) for kind in NOISES)
    assert min(wind, traffic) > 1.5 * crowd


def test_the_kinds_are_told_apart_by_their_bands() -> None:
    bands = np.log(np.array([[shares(made(kind, 3, seed)) for seed in range(8)] for kind in NOISES]) + 1e-6)
    for kind in range(len(NOISES)):
        for left_out in range(8):
            others = np.delete(bands, left_out, axis=1).mean(axis=1)
            distances = np.linalg.norm(others - bands[kind, left_out], axis=1)
            assert distances.argmin() == kind


def test_what_is_no_noise_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(NoiseError, match="no noise 'rain'; take one of wind, traffic, crowd"):
        synthesise_noise("rain", 100, RATE_HZ, rng)
    with pytest.raises(NoiseError, match="can't have -1 samples"):
        synthesise_noise("wind", -1, RATE_HZ, rng)
    assert [len(synthesise_noise(kind, 0, RATE_HZ, rng)) for kind in NOISES] == [0, 0, 0]


def test_a_recording_is_read_at_any_rate_and_scaled(tmp_path: Path) -> None:
    wave = 0.01 * np.sin(2 * np.pi * 300 * np.arange(44100) / 44100)
    soundfile.write(tmp_path / "hum.wav", np.stack([wave, wave], axis=1), 44100)
    noise = load_noise(tmp_path / "hum.wav", RATE_HZ)
    assert (noise.dtype, len(noise)) == (np.float32, RATE_HZ)
    assert power(noise) == pytest.approx(1, rel=1e-4)
    assert np.abs(np.fft.rfft(noise)).argmax() == 300


def test_unusable_recordings_are_refused_with_their_path(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silent.wav", np.zeros(100), 8000)
    soundfile.write(tmp_path / "long.wav", np.zeros(601_000, np.int16), 1000)
    (tmp_path / "text.wav").write_bytes(b"no sound")
    for name, message in {
        "silent.wav": "is silent",
        "long.wav": "lasts 601.0 s; at most 600 s",
        "text.wav": "can't be decoded",
        "missing.wav": "No such file",
    }.items():
        with pytest.raises(NoiseError, match=message) as caught:
            load_noise(tmp_path / name, RATE_HZ)
        assert name in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(0, 900), SEEDS)
def test_a_piece_is_a_part_of_the_noise_or_goes_round_in_it(available: int, samples: int, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(0, 1, available).astype(np.float32)
    piece = cut(noise, samples, np.random.default_rng(seed))
    assert (piece.dtype, len(piece)) == (np.float32, samples)
    assert np.array_equal(piece, cut(noise, samples, np.random.default_rng(seed)))
    if samples <= available:
        assert any(np.array_equal(piece, noise[first : first + samples]) for first in range(available - samples + 1))
    else:
        period = available - available // 4
        assert np.array_equal(piece[period:], piece[:-period])


def test_a_noise_that_goes_round_has_no_seam() -> None:
    ramp = np.linspace(-1, 1, 8000, dtype=np.float32)
    assert np.abs(np.diff(np.tile(ramp, 4))).max() == 2
    assert np.abs(np.diff(cut(ramp, 32000, np.random.default_rng(0)))).max() < 0.01


def test_pieces_start_everywhere() -> None:
    rng = np.random.default_rng(0)
    starts = {int(cut(np.arange(5, dtype=np.float32), 3, rng)[0]) for _ in range(100)}
    assert starts == {0, 1, 2}
    with pytest.raises(NoiseError, match="without samples"):
        cut(np.zeros(0, np.float32), 3, rng)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6000), st.floats(-20, 40), st.floats(0.001, 1), SEEDS)
def test_the_ratio_is_the_one_asked_for_also_where_the_sum_would_clip(
    samples: int, snr_db: float, level: float, seed: int
) -> None:
    clean = speech(seed, samples, level)
    noise = np.random.default_rng(seed).normal(0, 3, samples).astype(np.float32)
    gain = math.sqrt(active_power(clean) / power(noise)) * 10 ** (-snr_db / 20)
    expected = clean.astype(np.float64) + gain * noise
    mixed = mix(clean, noise, snr_db)
    assert mixed.dtype == np.float32
    assert np.abs(mixed).max() <= 1
    assert mixed == pytest.approx(expected / max(1, np.abs(expected).max()), abs=1e-6)


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("snr_db", [-5, 0, 5, 10, 15])
@pytest.mark.parametrize("level", [0.01, 0.9])
def test_the_ratio_is_measured_in_the_mixture(kind: str, snr_db: float, level: float) -> None:
    clean, noise = speech(1, 48000, level), made(kind, 3, 2)
    mixed = mix(clean, noise, snr_db)
    (of_speech, of_noise), *_ = np.linalg.lstsq(np.stack([clean, noise], axis=1).astype(np.float64), mixed)
    measured_db = 10 * math.log10(of_speech**2 * active_power(clean) / (of_noise**2 * power(noise)))
    assert measured_db == pytest.approx(snr_db, abs=0.1)
    assert of_speech == pytest.approx(1) or np.abs(mixed).max() == pytest.approx(1)


def test_pauses_dont_count_as_speech() -> None:
    clean, noise = speech(0, 12800), made("crowd", 1, 0)[:12800]
    padded = mix(np.pad(clean, (12800, 12800)), np.tile(noise, 3), 5)
    assert padded[12800:25600] == pytest.approx(mix(clean, noise, 5), abs=1e-6)


def test_silence_is_left_alone_and_lengths_must_agree() -> None:
    clean, silence = speech(0, 500), np.zeros(500, np.float32)
    assert np.array_equal(mix(silence, clean, 5), silence)
    assert np.array_equal(mix(clean, silence, 5), clean)
    assert len(mix(silence[:0], silence[:0], 5)) == 0
    with pytest.raises(NoiseError, match="Noise of 500 samples doesn't fit speech of 499"):
        mix(clean[:-1], silence, 5)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.1, 1), st.sampled_from([8000, 16000]), SEEDS)
def test_a_room_decays_by_60_db_in_its_time(rt60_s: float, rate_hz: int, seed: int) -> None:
    impulse = np.zeros(int(1.5 * rt60_s * rate_hz), np.float32)
    impulse[0] = 1
    heard = reverberate(impulse, rate_hz, rt60_s, np.random.default_rng(seed)).astype(np.float64)
    left = np.cumsum(heard[::-1] ** 2)[::-1]  # Schroeder, 1965
    level_db = 10 * np.log10(np.maximum(left / left[0], 1e-12))
    fitted = np.flatnonzero((level_db < -5) & (level_db > -35))
    slope_db, _ = np.polyfit(fitted / rate_hz, level_db[fitted], 1)
    assert -60 / slope_db == pytest.approx(rt60_s, rel=0.15)
    assert np.abs(heard[0]) == np.abs(heard).max()
    assert left[1] / heard[0] ** 2 == pytest.approx(1, rel=0.3)


@settings(max_examples=25, deadline=None)
@given(
    arrays(np.float32, st.integers(0, 600), elements=st.floats(-1, 1, width=32, allow_subnormal=False)),
    st.floats(1e-6, 1e6),
    SEEDS,
)
def test_a_room_keeps_length_and_level(wave: np.ndarray, rt60_s: float, seed: int) -> None:
    heard = reverberate(wave, RATE_HZ, rt60_s, np.random.default_rng(seed))
    assert (heard.dtype, heard.shape) == (np.float32, wave.shape)
    assert np.isfinite(heard).all()
    assert np.array_equal(heard, reverberate(wave, RATE_HZ, rt60_s, np.random.default_rng(seed)))
    if wave.any():
        assert active_power(heard) == pytest.approx(active_power(wave), rel=1e-3)
    else:
        assert not heard.any()


@pytest.mark.parametrize("rt60_s", [0.0, -1.0, math.nan, math.inf])
def test_a_room_needs_a_positive_time(rt60_s: float) -> None:
    with pytest.raises(NoiseError, match="reverberation time"):
        reverberate(np.ones(10, np.float32), RATE_HZ, rt60_s, np.random.default_rng(0))
