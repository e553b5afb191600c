"""Spoken digits: what splits share, what is skipped, what is refused, and the features of utterances."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.whisper.audio import AudioError, decode, resample
from models.whisper.config import DigitsConfig
from models.whisper.digits import WORDS, Sequences, splits
from models.whisper.speech import SpeechError, Spoken, synthesise
from models.whisper.utterances import DataError, Splits, Utterance, utterance_features, write_features

RATE_HZ = 8000


def tone(hz: float, seconds: float, rate_hz: int = RATE_HZ) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate_hz)) / rate_hz)).astype(np.float32)


def encoded(wave: np.ndarray, rate_hz: int = RATE_HZ, kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate_hz, format=kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in the layout of the Free Spoken Digit Dataset, with tones: three people, twenty recordings."""
    folder = tmp_path_factory.mktemp("data")
    recordings = folder / "speech-fsdd" / "recordings"
    recordings.mkdir(parents=True)
    for place, speaker in enumerate(("ann", "bob", "cy")):
        for index in range(20):
            for digit in (0, 7):
                wave = tone(200 + 50 * digit + 10 * place, 0.2 + 0.01 * index)
                (recordings / f"{digit}_{speaker}_{index}.wav").write_bytes(encoded(wave))
    return folder


def config(**values: object) -> DigitsConfig:
    return DigitsConfig.model_validate({"validation_utterances": 8, "test_utterances": 8, "max_seconds": 2} | values)


def lengths(part: Sequence[Utterance]) -> set[int]:
    return {len(one.wave) for one in part}


def test_recordings_of_the_test_split_are_in_no_other(data: Path) -> None:
    found = splits(config(digits=(1, 1), gap_s=(0, 0)), data)
    assert found.source == "recordings"
    assert len(found.train.utterances) == 3 * 16 * 2
    # The duration of a recording tells its index here.
    train, validation, test = lengths(found.train.utterances), lengths(found.validation), lengths(found.test)
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert {one.speaker for one in found.test} == {"ann", "bob", "cy"}


@pytest.mark.parametrize(("name", "tested"), [(None, "ann"), ("bob", "bob")])
def test_a_split_by_speaker_tests_a_speaker_of_whom_nothing_else_is_heard(
    data: Path, name: str | None, tested: str
) -> None:
    found = splits(config(split="speaker", test_speaker=name, digits=(1, 1), gap_s=(0, 0)), data)
    speakers = [{one.speaker for one in part} for part in (found.train.utterances, found.validation, found.test)]
    others = {"ann", "bob", "cy"} - {tested}
    assert speakers == [others, others, {tested}]
    assert not lengths(found.train.utterances) & lengths(found.validation)


def test_synthetic_voices_are_added_to_training_alone(data: Path) -> None:
    voices = {"voices": ("en-us",), "rates_wpm": (150, 180), "synthetic_share": 0.5}
    found, without = splits(config(split="speaker", **voices), data), splits(config(split="speaker"), data)
    assert {one.speaker for one in found.train.utterances} == {"bob", "cy", "en-us"}
    assert found.hash == without.hash
    assert [one.id for one in found.validation] == [one.id for one in without.validation]


def test_the_same_configuration_gives_the_same_split(data: Path) -> None:
    first, second = splits(config(), data), splits(config(), data)
    assert first.hash == second.hash
    assert all((a.wave == b.wave).all() for a, b in zip(first.test, second.test, strict=True))
    assert splits(config(seed=1), data).hash != first.hash
    assert len({one.id for one in (*first.test, *first.validation)}) == 16


def test_corrupt_recordings_are_skipped_counted_and_logged(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recordings = tmp_path / "speech-fsdd" / "recordings"
    recordings.mkdir(parents=True)
    for path in (data / "speech-fsdd" / "recordings").iterdir():
        (recordings / path.name).write_bytes(path.read_bytes())
    (recordings / "1_ann_0.wav").write_bytes(b"")
    (recordings / "1_ann_1.wav").write_bytes(b"RIFF no wav at all")
    (recordings / "noise.wav").write_bytes(encoded(tone(100, 0.1)))
    found = splits(config(), tmp_path)
    assert found.skipped == 3
    assert len(found.train.utterances) == 3 * 16 * 2
    assert [record.getMessage().count("recording skipped") for record in caplog.records] == [1, 1, 1]


@pytest.mark.parametrize(
    ("values", "folder", "message"),
    [
        ({}, "missing", "doesn't exist; correct MILLRACE_DATA"),
        ({"source": "recordings"}, None, "set MILLRACE_DATA or data.source=synthetic"),
        ({"source": "recordings", "folder": "elsewhere"}, "", "elsewhere/recordings: no recordings"),
        ({"split": "speaker", "test_speaker": "dan"}, "", "nobody of that name .* one of ann, bob, cy"),
    ],
)
def test_missing_data_is_one_sentence(data: Path, values: dict[str, object], folder: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        splits(config(**values), None if folder is None else data / folder)


def test_a_speaker_of_the_test_split_needs_a_split_by_speaker() -> None:
    with pytest.raises(ValidationError, match="test_speaker needs split=speaker"):
        config(test_speaker="ann")


def test_too_few_groups_are_refused(tmp_path: Path) -> None:
    recordings = tmp_path / "speech-fsdd" / "recordings"
    recordings.mkdir(parents=True)
    (recordings / "1_ann_0.wav").write_bytes(encoded(tone(100, 0.3)))
    with pytest.raises(DataError, match="too few to split by recording"):
        splits(config(), tmp_path)


def test_synthetic_speech_needs_no_data_and_never_changes() -> None:
    small = config(source="synthetic", voices=("en-us", "en+f4"), rates_wpm=(150, 180, 210))
    first, second = splits(small, None), splits(small, None)
    assert first.source == "synthetic"
    assert first.hash == second.hash
    assert {one.text for one in first.train.utterances} == set(WORDS)


def test_unknown_voices_and_silent_texts_are_refused() -> None:
    for voice in ("xx", "en-us+nobody"):
        with pytest.raises(SpeechError, match=f"no voice '{voice.replace('+', '.')}'"):
            synthesise([Spoken("one", voice, 160)])
    with pytest.raises(SpeechError, match="says nothing"):
        synthesise([Spoken(" ", "en", 160)])


def singles(*speakers: str) -> list[Utterance]:
    return [Utterance("", tone(200, 0.3), word, speaker, RATE_HZ) for word in WORDS for speaker in speakers]


@given(
    seed=st.integers(0, 10**6),
    fewest=st.integers(1, 3),
    more=st.integers(0, 3),
    epoch=st.integers(0, 8),
    max_seconds=st.integers(1, 4),
)
def test_sequences_keep_their_bounds(seed: int, fewest: int, more: int, epoch: int, max_seconds: int) -> None:
    wanted = config(digits=(fewest, fewest + more), gap_s=(0.05, 0.1), max_seconds=max_seconds)
    sequences = Sequences(singles("ann", "bob"), wanted)
    one = sequences.draw(np.random.default_rng(seed), epoch)
    again = sequences.draw(np.random.default_rng(seed), epoch)
    assert one.text == again.text
    assert (one.wave == again.wave).all()
    assert len(one.wave) <= max_seconds * RATE_HZ
    words = one.text.split()
    fitting = int((max_seconds - 0.1) / 0.4)  # a silence before all of them, one after each
    assert min(fewest, 1 + epoch, fitting) <= len(words) <= min(fewest + more, 1 + epoch)
    assert len(one.wave) >= len(words) * 0.3 * RATE_HZ


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_the_share_of_synthetic_speech_is_that_of_the_draws(share: float) -> None:
    sequences = Sequences(singles("ann", "bob", "cy"), config(synthetic_share=share), synthetic=singles("robot"))
    rng = np.random.default_rng(1)
    drawn = [sequences.draw(rng, epoch=4).speaker for _ in range(1000)]
    assert drawn.count("robot") == pytest.approx(1000 * share, abs=50 if share else 0)


def test_features_describe_what_is_heard(tmp_path: Path) -> None:
    square = Utterance("loud", np.ones(RATE_HZ, np.float32), "one", "ann", RATE_HZ)
    quiet = Utterance("quiet", np.full(4000, 0.1, np.float32), "two", "bob", RATE_HZ)
    silent = Utterance("silent", np.zeros(4000, np.float32), "two", "bob", RATE_HZ)
    found = Splits(Sequences([], config()), (), (square, quiet, silent), "synthetic", "abc", 0)
    path = write_features(found, tmp_path / "features")
    assert [file.name for file in path.parent.iterdir()] == ["abc.parquet"]
    table = pq.read_table(path)
    assert table.column_names == utterance_features(found.test).column_names
    assert table["duration_s"].to_pylist() == [1.0, 0.5, 0.5]
    assert table["level_db"].to_pylist()[:2] == pytest.approx([0.0, -20.0], abs=1e-3)
    assert table["level_db"].to_pylist()[2] < -150
    assert all(stamp.tzinfo is not None for stamp in table["event_timestamp"].to_pylist())


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
@pytest.mark.parametrize("rate_hz", [8000, 16000, 44100])
def test_any_rate_and_format_is_decoded_to_mono(kind: str, rate_hz: int) -> None:
    stereo = np.stack([tone(440, 1.0, rate_hz), tone(440, 1.0, rate_hz)], axis=1)
    wave = decode(encoded(stereo, rate_hz, kind), RATE_HZ)
    assert wave.dtype == np.float32
    assert len(wave) == pytest.approx(RATE_HZ, abs=2)
    spectrum = np.abs(np.fft.rfft(wave))
    assert np.argmax(spectrum) * RATE_HZ / len(wave) == pytest.approx(440, abs=2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes"),
        (b"not audio", "can't be decoded"),
        (encoded(tone(440, 1.0))[:20], "can't be decoded"),
        (encoded(np.zeros(0, np.float32)), "no samples"),
        (encoded(tone(440, 3.0)), "lasts 3.0 s"),
    ],
)
def test_unusable_uploads_are_refused_in_one_sentence(data: bytes, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        decode(data, RATE_HZ, max_seconds=2.0)


def test_samples_that_are_no_numbers_are_refused() -> None:
    file = io.BytesIO()
    soundfile.write(file, np.array([0.0, math.nan], np.float32), RATE_HZ, format="WAV", subtype="FLOAT")
    with pytest.raises(AudioError, match="not finite"):
        decode(file.getvalue(), RATE_HZ)


@given(st.binary(min_size=1, max_size=300))
def test_no_upload_breaks_the_decoder(noise: bytes) -> None:
    for data in (noise, encoded(tone(440, 0.1), kind="FLAC")[:40] + noise):
        try:
            wave = decode(data, RATE_HZ, max_seconds=10.0)
        except AudioError as refusal:
            assert str(refusal)
        else:
            assert np.isfinite(wave).all()


@given(st.binary(min_size=2, max_size=300))
def test_any_samples_after_a_header_are_heard(noise: bytes) -> None:
    wave = decode(encoded(tone(440, 0.1))[:44] + noise, RATE_HZ, max_seconds=10.0)
    assert len(wave) == len(noise) // 2
    assert np.abs(wave).max() <= 1


def test_resampling_keeps_a_tone() -> None:
    wave = resample(tone(300, 1.0, 22050), 22050, RATE_HZ)
    assert np.abs(wave[500:-500] - tone(300, 1.0)[500 : len(wave) - 500]).max() < 0.02
