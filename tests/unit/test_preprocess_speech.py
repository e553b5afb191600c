"""Steps before recognition: what denoising gains, where speech is found, and that no wave breaks them."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError
from scipy.signal import butter, sosfilt

from models.whisper.preprocess import PreprocessConfig, prepare, speech_spans

RATE_HZ = 16000
METHODS = ("spectral", "wiener")
WAVES = arrays(np.float32, st.integers(0, 300), elements=st.floats(-1, 1, width=32)).map(lambda wave: np.tile(wave, 10))
EVERY_CONFIG = [
    PreprocessConfig(denoise=denoise, normalise=normalise, trim=trim, equalise=equalise)
    for denoise, normalise, trim, equalise in itertools.product(
        ("none", *METHODS), ("none", "rms", "peak"), (False, True), (False, True)
    )
]


def syllables(seconds: float = 4.0) -> np.ndarray:
    """A voice whose pitch glides, four syllables a second, with a pause after every fourth one."""
    times = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    turns = 120 * times + 15 * np.sin(2 * np.pi * 0.5 * times)
    voice = sum(np.sin(2 * np.pi * number * turns) / number for number in range(1, 25))
    return (0.1 * voice * np.sin(4 * np.pi * times) ** 2 * (times % 1.5 < 1)).astype(np.float32)


def hiss(samples: int, level: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, level, samples).astype(np.float32)


def bursts(spans: list[tuple[float, float]], seconds: float, noise: float, seed: int = 0) -> np.ndarray:
    """Hiss of RMS 0.2 in the spans, of RMS `noise` everywhere."""
    wave = hiss(int(seconds * RATE_HZ), noise, seed)
    for start, end in spans:
        place = slice(round(start * RATE_HZ), round(end * RATE_HZ))
        wave[place] += hiss(len(wave), 0.2, seed + 1)[place]
    return wave


def snr_db(clean: np.ndarray, heard: np.ndarray) -> float:
    error = heard.astype(np.float64) - clean
    return 10 * math.log10(np.sum(clean.astype(np.float64) ** 2) / np.sum(error**2))


def rms_db(wave: np.ndarray) -> float:
    return 10 * math.log10(np.mean(np.square(wave, dtype=np.float64)))


@settings(max_examples=20, deadline=None)
@given(WAVES)
def test_by_default_nothing_is_done(wave: np.ndarray) -> None:
    assert np.array_equal(prepare(wave, RATE_HZ, PreprocessConfig()), wave)


@settings(max_examples=15, deadline=None)
@given(WAVES, st.sampled_from([4000, 8000]))
def test_no_wave_breaks_a_step(wave: np.ndarray, rate_hz: int) -> None:
    before = wave.copy()
    for config in EVERY_CONFIG:
        found = prepare(wave, rate_hz, config)
        assert found.dtype == np.float32
        assert np.isfinite(found).all()
        assert len(found) == len(wave) or (config.trim and 0 < len(found) < len(wave))
    assert np.array_equal(wave, before)
    ends = [0.0, *itertools.chain.from_iterable(speech_spans(wave, rate_hz)), len(wave) / rate_hz]
    assert ends == sorted(ends)


@pytest.mark.parametrize(
    "wave",
    [
        np.zeros(0),
        np.ones(1),
        np.zeros(1),
        np.ones(5),
        np.zeros(RATE_HZ),
        np.full(RATE_HZ, 0.3),
        np.full(RATE_HZ, 1e-30),
        np.pad(np.ones(1), RATE_HZ),
    ],
    ids=["empty", "one", "one of silence", "short", "silence", "constant", "faint", "click"],
)
def test_the_edges_of_sound_stay_finite_and_whole(wave: np.ndarray) -> None:
    wave = wave.astype(np.float32)
    for config in EVERY_CONFIG:
        found = prepare(wave, RATE_HZ, config)
        assert (found.dtype, found.shape) == (np.float32, wave.shape)
        assert np.isfinite(found).all()
    assert speech_spans(wave, RATE_HZ) == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("before_db", "gain_db"), [(0, 7.5), (5, 6), (10, 4.5)])
def test_denoising_raises_the_ratio_in_steady_noise(method: str, before_db: int, gain_db: float) -> None:
    clean = syllables()
    noise = hiss(len(clean), float(np.std(clean)) * 10 ** (-before_db / 20))
    found = prepare(clean + noise, RATE_HZ, PreprocessConfig(denoise=method))
    assert snr_db(clean, found) > snr_db(clean, clean + noise) + gain_db


@pytest.mark.parametrize("method", METHODS)
def test_denoising_leaves_clean_speech_nearly_as_it_is(method: str) -> None:
    clean = syllables() + hiss(4 * RATE_HZ, 1e-4)
    assert snr_db(clean, prepare(clean, RATE_HZ, PreprocessConfig(denoise=method))) > 40


@pytest.mark.parametrize("method", METHODS)
def test_denoising_takes_noise_away_also_where_the_ends_are_digital_silence(method: str) -> None:
    noise = hiss(2 * RATE_HZ, 0.1)
    for wave in (noise, np.pad(noise, RATE_HZ)):
        found = prepare(wave, RATE_HZ, PreprocessConfig(denoise=method))
        assert rms_db(found) < rms_db(wave) - 14


def test_waves_too_short_to_learn_from_keep_their_colour() -> None:
    equalise = PreprocessConfig(equalise=True)
    assert np.array_equal(prepare(syllables()[:3999], RATE_HZ, equalise), syllables()[:3999])
    assert not np.array_equal(prepare(syllables()[:4000], RATE_HZ, equalise), syllables()[:4000])


def test_the_methods_differ_and_short_waves_are_left_alone() -> None:
    noisy = syllables() + hiss(4 * RATE_HZ, 0.05)
    spectral, wiener = (prepare(noisy, RATE_HZ, PreprocessConfig(denoise=method)) for method in METHODS)
    assert snr_db(spectral, wiener) < 30
    for method in METHODS:
        assert np.array_equal(prepare(noisy[:3999], RATE_HZ, PreprocessConfig(denoise=method)), noisy[:3999])
        assert not np.array_equal(prepare(noisy[:4000], RATE_HZ, PreprocessConfig(denoise=method)), noisy[:4000])


def third_octaves_db(wave: np.ndarray) -> np.ndarray:
    """Levels between 200 Hz and 6.3 kHz, with a mean of 0."""
    power = np.abs(np.fft.rfft(wave.astype(np.float64))) ** 2
    edges = np.rint(200 * 2 ** (np.arange(16) / 3) * len(wave) / RATE_HZ).astype(int)
    levels = 10 * np.log10(np.add.reduceat(power, edges)[:-1])
    return np.asarray(levels - levels.mean())


@pytest.mark.parametrize(("order", "cutoff_hz", "kind"), [(1, 1000, "high"), (1, 500, "low"), (2, 400, "high")])
def test_equalising_undoes_the_colour_of_a_microphone(order: int, cutoff_hz: float, kind: str) -> None:
    speech = syllables() + hiss(4 * RATE_HZ, 0.003)
    coloured = sosfilt(butter(order, cutoff_hz, kind, fs=RATE_HZ, output="sos"), speech).astype(np.float32)
    assert np.abs(third_octaves_db(coloured) - third_octaves_db(speech)).max() > 5
    flat, found = (prepare(wave, RATE_HZ, PreprocessConfig(equalise=True)) for wave in (speech, coloured))
    assert np.abs(third_octaves_db(found) - third_octaves_db(flat)).max() < 1.5


def test_what_a_line_does_not_carry_is_not_made_of_its_noise() -> None:
    narrow = sosfilt(butter(8, 1500, fs=RATE_HZ, output="sos"), syllables()).astype(np.float32)
    wave = narrow + hiss(len(narrow), 1e-5)
    gains = third_octaves_db(prepare(wave, RATE_HZ, PreprocessConfig(equalise=True))) - third_octaves_db(wave)
    assert np.ptp(gains) <= 40.1


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.25, 0.6), st.floats(0.1, 0.5)), min_size=1, max_size=4),
    st.sampled_from([0.0, 1e-4, 0.01, 0.05]),
    st.integers(0, 10**6),
)
def test_speech_is_found_within_50_ms(pauses_and_bursts: list[tuple[float, float]], noise: float, seed: int) -> None:
    ends = np.cumsum(pauses_and_bursts)
    expected = list(zip(ends[::2].tolist(), ends[1::2].tolist(), strict=True))
    wave = bursts(expected, ends[-1] + 0.4, noise, seed)
    assert np.array(speech_spans(wave, RATE_HZ)) == pytest.approx(np.array(expected), abs=0.05)
    trimmed = prepare(wave, RATE_HZ, PreprocessConfig(trim=True))
    assert len(trimmed) / RATE_HZ == pytest.approx(expected[-1][1] - expected[0][0] + 0.2, abs=0.1)


def test_short_pauses_are_bridged_and_short_sounds_are_no_speech() -> None:
    wave = bursts([(0.5, 0.7), (0.85, 1.0), (1.3, 1.5), (2.0, 2.01)], 2.5, 0.001)
    assert np.array(speech_spans(wave, RATE_HZ)) == pytest.approx(np.array([(0.5, 1.0), (1.3, 1.5)]), abs=0.03)


@pytest.mark.parametrize("level", [1e-3, 0.1, 1.0])
def test_noise_alone_is_no_speech_and_isnt_trimmed(level: float) -> None:
    noise = hiss(3 * RATE_HZ, level)
    assert speech_spans(noise, RATE_HZ) == []
    assert np.array_equal(prepare(noise, RATE_HZ, PreprocessConfig(trim=True)), noise)


def test_rumble_below_the_voice_is_no_speech() -> None:
    times = np.arange(3 * RATE_HZ) / RATE_HZ
    rumble = 0.5 * np.sin(2 * np.pi * 25 * times) * np.sin(np.pi * times) ** 2
    wave = bursts([(1.2, 1.5)], 3.0, 0.01) + rumble.astype(np.float32)
    assert np.array(speech_spans(wave, RATE_HZ)) == pytest.approx(np.array([(1.2, 1.5)]), abs=0.05)


def test_the_floor_follows_noise_that_grows() -> None:
    at = [(start, start + 0.5) for start in (2.0, 8.0, 28.0, 38.0)]
    growing = np.repeat(np.float32([0.001, 0.03]), 20 * RATE_HZ)
    spans = speech_spans(bursts(at, 40.0, 0.0) + growing * hiss(len(growing), 1.0), RATE_HZ)
    (taken_for_speech,) = [span for span in spans if span[0] == pytest.approx(20, abs=0.05)]
    assert taken_for_speech[1] < 25
    spans.remove(taken_for_speech)
    assert np.array(spans) == pytest.approx(np.array(at), abs=0.05)


def test_a_constant_offset_hides_no_speech() -> None:
    wave = 0.005 * bursts([(1.0, 1.5)], 3.0, 0.001)
    assert speech_spans(wave + np.float32(0.9), RATE_HZ) == speech_spans(wave, RATE_HZ)


def test_what_16_bits_cant_hold_is_no_speech() -> None:
    assert speech_spans(np.float32(1e-5) * bursts([(1.0, 1.5)], 3.0, 0.001), RATE_HZ) == []


@pytest.mark.parametrize("gain", [2.0**-6, 0.25, 4.0])
def test_spans_dont_depend_on_the_level(gain: float) -> None:
    wave = syllables() + hiss(4 * RATE_HZ, 0.003)
    assert len(speech_spans(wave, RATE_HZ)) == 3
    assert speech_spans((gain * wave).astype(np.float32), RATE_HZ) == speech_spans(wave, RATE_HZ)


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1.5), st.floats(0.05, 0.5), st.sampled_from([0.0, 0.01, 0.05]), st.integers(0, 10**6))
def test_trimming_keeps_every_loud_burst(start: float, length: float, noise: float, seed: int) -> None:
    first, last = (start, start + length), (start + 0.7, start + 0.7 + length)
    wave = bursts([first, last], 3.0, noise, seed)
    trimmed = prepare(wave, RATE_HZ, PreprocessConfig(trim=True))
    loud = wave[round(first[0] * RATE_HZ) : round(last[1] * RATE_HZ)]
    assert loud.tobytes() in trimmed.tobytes()


@settings(max_examples=30, deadline=None)
@given(st.floats(-40, -20), st.floats(1e-4, 1))
def test_the_level_is_the_one_asked_for(level_db: float, level: float) -> None:
    wave = (level * 5 * syllables(0.5)).astype(np.float32)
    assert rms_db(prepare(wave, RATE_HZ, PreprocessConfig(normalise="rms", level_db=level_db))) == pytest.approx(
        level_db, abs=0.01
    )
    peak = np.abs(prepare(wave, RATE_HZ, PreprocessConfig(normalise="peak", level_db=level_db))).max()
    assert 20 * math.log10(peak) == pytest.approx(level_db, abs=0.01)


def test_a_level_is_reached_only_as_far_as_nothing_clips() -> None:
    found = prepare(syllables(), RATE_HZ, PreprocessConfig(normalise="rms", level_db=0.0))
    assert np.abs(found).max() == pytest.approx(1)
    assert np.abs(found).max() <= 1


def test_steps_go_from_denoising_over_trimming_and_equalising_to_the_level() -> None:
    wave = bursts([(1.0, 1.5)], 3.0, 0.03)
    every = PreprocessConfig(denoise="wiener", trim=True, equalise=True, normalise="rms", range_db=40, lifter_ms=2.5)
    assert every.label == "wiener and trim and equalise and rms and 40 dB and lifter 2.5 ms"
    together = prepare(wave, RATE_HZ, every)
    one_by_one = wave
    for step in ({"denoise": "wiener"}, {"trim": True}, {"equalise": True}, {"normalise": "rms"}):
        one_by_one = prepare(one_by_one, RATE_HZ, PreprocessConfig.model_validate(step))
    assert np.array_equal(together, one_by_one)
    assert rms_db(together) == pytest.approx(-20, abs=0.01)


@pytest.mark.parametrize(
    "wrong",
    [
        {"denoise": "magic"},
        {"normalise": "lufs"},
        {"level_db": 3},
        {"range_db": 81},
        {"lifter_ms": 0},
        {"trimming": True},
    ],
)
def test_wrong_configurations_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PreprocessConfig.model_validate(wrong)
