"""Synthetic dictation and recorded sentences: what splits share, what is heard with which noise, and terms."""

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.metrics.term_recall import TermRecall
from models.whisper import dictation, recordings
from models.whisper.conditions import EASY_EPOCHS, Noises, Noisy
from models.whisper.config import DictationConfig, NoiseConfig, RecordingsConfig, WhisperConfig
from models.whisper.sentences import DOMAINS, Domain, SentenceError, named, terms_in
from models.whisper.speech import Spoken
from models.whisper.utterances import DataError, Utterance, utterance_features
from ops.configuration import load

CONFIGS = Path(__file__).parents[2] / "configs" / "whisper"
RATE_HZ = 8000


class Humming:
    """Stands for espeak-ng, which takes seconds: a tone whose length says how long the text is."""

    def speak(self, texts: Sequence[Spoken], sample_rate_hz: int) -> list[np.ndarray]:
        return [tone(len(text.text) / 40, sample_rate_hz) for text in texts]


def tone(seconds: float, rate_hz: int = RATE_HZ) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * 300 * np.arange(round(seconds * rate_hz)) / rate_hz)).astype(np.float32)


def config(**values: object) -> DictationConfig:
    small = {"sentences": 60, "test_sentences": 5, "validation_utterances": 4, "sample_rate_hz": RATE_HZ}
    return DictationConfig.model_validate({"kind": "dictation"} | small | values)


def texts(part: Sequence[Utterance], subset: str) -> set[str]:
    return {one.text for one in part if one.subset == subset}


def test_the_field_has_enough_terms_and_sentences() -> None:
    field = named("field")
    assert len(field.terms) >= 60
    found = field.sentences(1200, np.random.default_rng(0))
    assert len(set(found)) == 1200
    assert sum(bool(terms_in(text, field.terms)) for text in found) > 0.99 * len(found)
    assert {term for text in found for term in terms_in(text, field.terms)} == set(field.terms)


@pytest.mark.parametrize("name", sorted(DOMAINS))
def test_sentences_are_lower_case_words(name: str) -> None:
    for text in named(name).sentences(300, np.random.default_rng(1)):
        assert text == recordings.spoken(text), "as transcripts of recordings are compared"


def test_more_sentences_than_there_are_is_refused() -> None:
    with pytest.raises(SentenceError, match="ask for fewer"):
        Domain(("a {thing}",), {"thing": ("door", "key")}).sentences(3, np.random.default_rng(0))
    with pytest.raises(SentenceError, match="there are general, field, coffee"):
        named("sea")


def test_no_sentence_is_in_two_splits() -> None:
    found = dictation.splits(config(), None, Humming())
    for subset in ("field", "general"):
        train, validation, test = (
            texts(part, subset) for part in (found.train.utterances, found.validation, found.test)
        )
        assert (len(train - set(named(subset).phrases)), len(validation), len(test)) == (60, 4, 5)
        assert not train & validation
        assert not (train | validation) & test


def test_what_a_base_trains_on_is_in_no_test_split_of_its_adapters() -> None:
    base = dictation.splits(config(domain="general", sentences=200), None, Humming())
    adapters = dictation.splits(config(domain="field"), None, Humming())
    assert texts(base.test, "general") == texts(adapters.test, "general")
    assert not texts(base.train.utterances, "general") & texts(adapters.test, "general")


def test_every_test_sentence_is_heard_in_every_condition_by_one_voice() -> None:
    found = dictation.splits(config(), None, Humming())
    conditions = {(one.noise, one.snr_db) for one in found.test}
    assert len(conditions) == 1 + 3 * 4
    assert len(found.test) == 2 * 5 * len(conditions)
    assert len({one.id for one in found.test}) == len(found.test)
    voices: dict[str, set[str]] = {}
    for one in found.test:
        voices.setdefault(one.text, set()).add(one.speaker)
    assert {len(heard) for heard in voices.values()} == {1}
    again = dictation.splits(config(), None, Humming())
    assert (again.hash, again.source) == (found.hash, "synthetic field")
    assert dictation.splits(config(seed=1), None, Humming()).hash != found.hash


def test_sentences_that_are_too_long_are_left_out_and_counted() -> None:
    whole = dictation.splits(config(), None, Humming())
    short = dictation.splits(config(max_seconds=1), None, Humming())
    assert whole.skipped == 0
    assert short.skipped > 0
    assert max(len(one.wave) for one in short.test) <= RATE_HZ


def test_replay_is_the_share_of_everyday_sentences() -> None:
    found = dictation.splits(config(replay=0.25, noise={"clean": 1, "reverberant": 0}), None, Humming())
    rng = np.random.default_rng(0)
    drawn = [found.train.draw(rng, 20) for _ in range(400)]
    assert sum(one.subset == "general" for one in drawn) / 400 == pytest.approx(0.25, abs=0.07)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), snr_db=st.sampled_from([0.0, 5.0, 15.0]), name=st.sampled_from(["wind", "crowd"]))
def test_the_ratio_is_that_of_the_speech_to_the_noise(seed: int, snr_db: float, name: str) -> None:
    speech = Utterance("", 0.05 * tone(0.5), "one two", "ann", RATE_HZ)
    noises = Noises.open(NoiseConfig(margin_s=(0.0, 0.0)), None, RATE_HZ)
    heard = noises.held_out(speech, "test", name, snr_db, [seed])
    assert (heard.noise, heard.snr_db, heard.text) == (name, snr_db, speech.text)
    noise = heard.wave - speech.wave
    measured = 10 * math.log10(float(np.mean(speech.wave**2)) / float(np.mean(noise**2)))
    assert measured == pytest.approx(snr_db, abs=0.1)


def test_a_recorded_noise_is_split_too_and_needs_its_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    low = np.sin(2 * np.pi * 100 * np.arange(3 * RATE_HZ) / RATE_HZ)
    soundfile.write(tmp_path / "hall.wav", np.concatenate([0.1 * rng.normal(size=9 * RATE_HZ), low]), RATE_HZ)
    hall = NoiseConfig(noises=("hall.wav",), snr_db=(0.0,), clean=0.0, reverberant=0.0, margin_s=(0.0, 0.0))
    noises = Noises.open(hall, tmp_path, RATE_HZ)
    silence = Utterance("", tone(0.5) * 1e-3, "one", "ann", RATE_HZ)
    training = [noises.drawn(silence, np.random.default_rng(seed), 0).wave for seed in range(5)]
    test = noises.held_out(silence, "test", "hall.wav", 0.0, [0])
    assert test.noise == "hall"
    assert high_share(test.wave) < 0.1 < min(map(high_share, training)), "the last quarter is a low tone"
    with pytest.raises(DataError, match="hall.wav is a recording: set MILLRACE_DATA"):
        Noises.open(hall, None, RATE_HZ)


def high_share(wave: np.ndarray) -> float:
    power = np.abs(np.fft.rfft(wave)) ** 2
    return float(power[len(power) // 5 :].sum() / power.sum())


def test_conditions_are_features_beside_the_subset() -> None:
    found = dictation.splits(config(), None, Humming())
    table = utterance_features(found.test)
    assert {"field", "general"} == set(table["subset"].to_pylist())
    assert {"field, wind 5 dB", "general, clean"} <= set(table["condition"].to_pylist())
    assert {"field, 0 dB", "field, clean"} <= set(table["ratio"].to_pylist())
    assert {"general, traffic", "general, clean"} <= set(table["noise"].to_pylist())


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """Ten recordings in the layout of LJSpeech, one broken and one missing."""
    (tmp_path / "lines" / "wavs").mkdir(parents=True)
    with (tmp_path / "lines" / "metadata.csv").open("w") as file:
        for number in range(12):
            csv.writer(file, delimiter="|").writerow([f"L{number}", "Mr. Ten", f"Mister Ten, the “{number}th”!"])
            if number < 10:
                soundfile.write(tmp_path / "lines" / "wavs" / f"L{number}.wav", tone(1 + number / 20), RATE_HZ)
    (tmp_path / "lines" / "wavs" / "L10.wav").write_bytes(b"broken")
    return tmp_path


def test_recorded_lines_are_split_by_recording(sentences: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = RecordingsConfig(kind="recordings", layout="ljspeech", folder="lines", sample_rate_hz=RATE_HZ)
    found = recordings.splits(lines, sentences)
    assert found.skipped == 2
    assert sum("recording skipped" in record.getMessage() for record in caplog.records) == 2
    texts = {one.text for one in found.train.utterances}
    assert texts <= {f"mister ten the {number}th" for number in range(12)}, "digits are words as others are"
    assert len(texts) == len(found.train.utterances)
    parts = [{one.speaker for one in part} for part in (found.train.utterances, found.validation, found.test)]
    assert parts == [{"recorded"}] * 3
    assert len(found.train.utterances) + len(found.validation) + len(found.test) // 13 == 10
    with pytest.raises(DataError, match="set MILLRACE_DATA"):
        recordings.splits(lines, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Füße, über_café!", "füße über café"),
        ("Don’t — well-known", "don't well known"),
        ("привет, мир", "привет мир"),
        ("cafe\u0301", "caf\u00e9"),
        ("…?!", ""),
    ],
)
def test_letters_of_any_language_stay(text: str, said: str) -> None:
    assert recordings.spoken(text) == said


def test_a_large_test_split_leaves_something_for_the_others(sentences: Path) -> None:
    lines = RecordingsConfig(kind="recordings", layout="ljspeech", folder="lines", sample_rate_hz=RATE_HZ)
    found = recordings.splits(lines.model_copy(update={"test_share": 0.8}), sentences)
    assert (len(found.train.utterances), len(found.validation), len(found.test) // 13) == (1, 1, 8)


@pytest.mark.skipif("MILLRACE_DATA" not in os.environ, reason="needs the recordings of MILLRACE_DATA")
@pytest.mark.parametrize("name", ["orders", "ljspeech"])
def test_the_configurations_of_real_recordings_find_all_of_them(name: str) -> None:
    config = load(WhisperConfig, CONFIGS / f"{name}.yaml", [])
    assert isinstance(config.data, RecordingsConfig)
    found = recordings.splits(config.data, Path(os.environ["MILLRACE_DATA"]))
    assert found.skipped == 0
    assert all((found.train.utterances, found.validation, found.test))


def test_orders_have_terms_in_place_of_transcripts(tmp_path: Path) -> None:
    (tmp_path / "shop" / "clean").mkdir(parents=True)
    labels = {f"{number}.flac": {"slots": {"size": "large", "milk": " skim milk"}} for number in range(8)}
    (tmp_path / "shop" / "label.json").write_text(json.dumps(labels))
    for name in labels:
        file = io.BytesIO()
        soundfile.write(file, tone(1.0), RATE_HZ, format="FLAC")
        (tmp_path / "shop" / "clean" / name).write_bytes(file.getvalue())
    orders = RecordingsConfig(kind="recordings", layout="orders", folder="shop", sample_rate_hz=RATE_HZ)
    found = recordings.splits(orders, tmp_path)
    assert {one.text for one in found.test} == {"large skim milk"}
    assert terms_in("large skim milk", found.terms) == ["large", "skim milk"]


def test_terms_are_whole_words_and_the_longest_ones() -> None:
    terms = ("milk", "skim milk", "oil leak")
    assert terms_in("skim milk and milk milkshake oil leaks", terms) == ["skim milk", "milk"]
    assert terms_in("anything", ()) == []


def test_recall_counts_each_term_as_often_as_it_is_said() -> None:
    recall = TermRecall(("gasket", "oil leak"))
    said = ["oil leak at the gasket", "gasket and gasket", "nothing of ours"]
    heard = ["oil leak at the basket", "gasket gasket gasket", "gasket"]
    statistics = recall.statistics(heard, said)
    assert statistics.tolist() == [[1, 2], [2, 2], [0, 0]]
    scores = recall.scores(statistics, np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]))
    assert scores[0] == 0.75
    assert math.isnan(scores[1])
    assert recall.losses(statistics).tolist() == [1, 0, 0]
    assert recall.trials(statistics, np.arange(3)) == 2


def test_an_easy_start_is_clean_and_noise_comes_in() -> None:
    loud = NoiseConfig(clean=0.0, reverberant=0.5, margin_s=(0.0, 0.0), easy_start=True)
    one = Utterance("", tone(0.2), "one", "ann", RATE_HZ, "recorded")
    pool = Noisy([one], Noises.open(loud, None, RATE_HZ), {"recorded": 1.0, "absent": 0.0})
    rng = np.random.default_rng(0)
    clean = [
        np.mean([np.array_equal(pool.draw(rng, epoch).wave, one.wave) for _ in range(60)])
        for epoch in (0, EASY_EPOCHS // 2, EASY_EPOCHS)
    ]
    assert clean[0] == 1
    assert 0.25 < clean[1] < 0.75
    assert clean[2] == 0
