"""Long and live transcription of random words by a fake model that reads them off the samples."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.whisper.audio import AudioError, quiet_cuts
from models.whisper.longform import Streaming, transcribe_long
from models.whisper.predict import Transcript, WhisperPredictor, Word

RATE_HZ = 100
MAX_S = 4.0
NAMES = ("alpha", "bravo", "carol")
JITTER_S = 0.02
AUDIBLE_S = 0.1


@dataclass(frozen=True)
class Spoken:
    """A word that follows the one before it after a gap; both in samples."""

    gap: int
    name: int
    length: int


class Scribe(WhisperPredictor):
    """Reads words off samples that say which word they belong to and how far into it they are.

    A fake, since no small network is right about every word, and only where the model is can a lost word be blamed on
    the joining. It has the weaknesses of a model: a word of which a part is missing comes out wrong, and differently
    with every part, less than 0.1 s is not heard at all, and times vary by 20 ms from one hearing to the next.
    """

    def __init__(self) -> None:
        self.sample_rate_hz = RATE_HZ
        self.max_seconds = MAX_S
        self.heard: list[int] = []

    def transcribe(self, waves: Sequence[np.ndarray], *, timestamps: bool = False) -> list[Transcript]:
        assert timestamps
        return [self._read(wave) for wave in waves]

    def _read(self, wave: np.ndarray) -> Transcript:
        self._check(wave)
        self.heard.append(len(wave))
        jitter = np.random.default_rng([len(wave), int(np.abs(wave).sum() * 1000)])
        names, progress = np.divmod(wave.astype(np.float64) * 100, 1)
        borders = np.flatnonzero((np.diff(names) != 0) | (np.diff(progress) < 0)) + 1
        words: list[Word] = []
        for start, end in itertools.pairwise([0, *borders.tolist(), len(wave)]):
            if not names[start] or end - start < AUDIBLE_S * RATE_HZ:
                continue
            each = progress[start + 1] - progress[start]
            part = (progress[end - 1] - progress[start] + each) / 0.9
            text = NAMES[int(names[start]) - 1] + ("" if part > 0.999 else f"?{part:.2f}")
            times = np.array([start, end]) / RATE_HZ + jitter.uniform(-JITTER_S, JITTER_S, 2)
            start_s, end_s = np.clip(times, words[-1].end_s if words else 0, len(wave) / RATE_HZ).tolist()
            words.append(Word(text, start_s, max(start_s, end_s), 0.9))
        return Transcript(" ".join(word.text for word in words), 0.5, tuple(words))


def said(words: Sequence[Spoken]) -> tuple[np.ndarray, list[Word]]:
    """The samples and what is to be heard in them; a second of silence follows."""
    wave, expected = [np.zeros(1)], []
    for word in words:
        start = sum(map(len, wave)) + word.gap
        expected.append(Word(NAMES[word.name], start / RATE_HZ, (start + word.length) / RATE_HZ, 0.9))
        wave += [np.zeros(word.gap), (word.name + 1.05 + 0.9 * np.arange(word.length) / word.length) / 100]
    return np.concatenate([*wave, np.zeros(RATE_HZ)]).astype(np.float32), expected


def same(words: Sequence[Word], expected: Sequence[Word]) -> None:
    assert [word.text for word in words] == [word.text for word in expected]
    times = [time for word in words for time in (word.start_s, word.end_s)]
    assert times == sorted(times)
    assert times == pytest.approx([time for word in expected for time in (word.start_s, word.end_s)], abs=0.05)


words = st.lists(
    st.builds(
        Spoken,
        gap=st.one_of(st.integers(0, 5), st.integers(0, 60), st.integers(0, 1000)),
        name=st.integers(0, len(NAMES) - 1),
        length=st.integers(20, 60),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(words)
def test_long_audio_loses_and_doubles_no_word(spoken: list[Spoken]) -> None:
    wave, expected = said(spoken)
    found = transcribe_long(Scribe(), wave)
    same(found.words, expected)
    assert found.text == " ".join(word.text for word in expected)
    assert found.confidence == pytest.approx(0.9 if expected else 0.5)


@settings(max_examples=40, deadline=None)
@given(words, st.sampled_from([0.3, 0.5, 1.0]), st.lists(st.integers(1, 700), min_size=1))
def test_live_audio_loses_and_doubles_no_word(spoken: list[Spoken], step_s: float, sizes: list[int]) -> None:
    wave, expected = said(spoken)
    scribe = Scribe()
    streaming = Streaming(scribe, step_s=step_s)
    before: tuple[Word, ...] = ()
    start = 0
    for size in itertools.cycle(sizes):
        if start >= len(wave):
            break
        update = streaming.feed(wave[start : start + size])
        start += size
        assert update.confirmed[: len(before)] == before, "what is confirmed stays"
        before = update.confirmed
    found = streaming.finish()
    assert found.words[: len(before)] == before
    same(found.words, expected)

    another = Scribe()
    whole = Streaming(another, step_s=step_s)
    whole.feed(wave)
    assert whole.finish() == found, "the same, however the audio arrives"
    assert another.heard == scribe.heard
    assert max(scribe.heard) <= MAX_S * RATE_HZ


def test_words_are_confirmed_a_step_after_they_were_first_heard_whole() -> None:
    wave, _ = said([Spoken(0, 0, 30), Spoken(0, 1, 40)])
    streaming = Streaming(Scribe(), step_s=0.5)
    updates = [streaming.feed(wave[start : start + 50]) for start in range(0, 150, 50)]
    shown = [([word.text for word in update.confirmed], update.partial) for update in updates]
    assert shown == [([], "alpha bravo?0.47"), (["alpha"], "bravo"), (["alpha", "bravo"], "")]
    assert streaming.feed(wave[150:150]) == updates[-1]


def test_a_pause_is_preferred_for_the_cut() -> None:
    class Sparse(Scribe):
        def transcribe(self, waves: Sequence[np.ndarray], *, timestamps: bool = False) -> list[Transcript]:
            self.cuts = [wave[-1] for wave in waves[:-1]]
            return super().transcribe(waves, timestamps=timestamps)

    wave, expected = said([Spoken(25, number % 3, 55) for number in range(20)])
    scribe = Sparse()
    same(transcribe_long(scribe, wave, overlap_s=0.0).words, expected)
    assert len(scribe.cuts) > 3 and not any(scribe.cuts)


def test_a_model_that_never_agrees_with_itself_is_taken_at_its_last_word() -> None:
    class Fickle(Scribe):
        def transcribe(self, waves: Sequence[np.ndarray], *, timestamps: bool = False) -> list[Transcript]:
            (found,) = super().transcribe(waves, timestamps=timestamps)
            renamed = (Word(f"{word.text}{len(self.heard)}", word.start_s, word.end_s, 0.1) for word in found.words)
            return [Transcript("", 0.1, tuple(renamed))]

    wave, expected = said([Spoken(30, number % 3, 40) for number in range(40)])
    scribe = Fickle()
    streaming = Streaming(scribe, step_s=0.5)
    streaming.feed(wave)
    assert [word.text.rstrip("0123456789") for word in streaming.finish().words] == [word.text for word in expected]
    assert max(scribe.heard) <= MAX_S * RATE_HZ


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(AudioError, match="no samples"):
        transcribe_long(Scribe(), np.zeros(0, np.float32))
    with pytest.raises(AudioError, match="no samples"):
        Streaming(Scribe()).finish()
    with pytest.raises(ValueError, match="overlap_s=2.5 must be from 0 to half of the 4 s"):
        transcribe_long(Scribe(), np.zeros(10, np.float32), overlap_s=2.5)
    for step_s in (0.0, 2.5):
        with pytest.raises(ValueError, match="step_s=.* at most half of 4 s"):
            Streaming(Scribe(), step_s=step_s)


@settings(deadline=None)
@given(samples=st.integers(0, 900), longest=st.integers(20, 200), share=st.floats(0, 0.25), seed=st.integers(0, 99))
def test_no_piece_is_too_long_and_every_sample_is_in_one(samples: int, longest: int, share: float, seed: int) -> None:
    margin = int(share * longest)
    wave = np.random.default_rng(seed).normal(size=samples).astype(np.float32)
    cuts = quiet_cuts(wave, 100, longest, margin)
    starts, ends = [0, *(cut - margin for cut in cuts)], [*(cut + margin for cut in cuts), samples]
    assert all(0 <= end - start <= longest for start, end in zip(starts, ends, strict=True))
    assert cuts == sorted(set(cuts))
    assert len(cuts) <= max(0, samples - 1) // max(1, longest // 2 - margin)
