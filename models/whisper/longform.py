"""Transcripts of audio that is longer than a model takes: of a whole recording, or live while it is spoken."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from models.whisper.audio import quiet_cuts
from models.whisper.predict import Transcript, WhisperPredictor, Word

Wave = NDArray[np.float32]

_OVERLAP_S = 2.0
_AT_ONCE = 8


def transcribe_long(predictor: WhisperPredictor, wave: Wave, *, overlap_s: float | None = None) -> Transcript:
    """Transcribe mono float32[N] samples of any length, with words; their times count from the start of the wave.

    Chunks of at most `max_seconds` are cut at the quietest moments of their later halves. Both neighbours of a cut hear
    `overlap_s` around it, by default a third of `max_seconds` and at most 2 s, and are joined at the word nearest to
    the cut that both have heard, or by the words' times where there is none. A word longer than half of the overlap
    may be cut.

    Returns:
        The words' texts, and the mean of their confidences; the mean confidence of the chunks if nothing is said.

    Raises:
        AudioError: the wave is empty.
        ValueError: `overlap_s` is negative or more than half of what the model takes.
    """
    if overlap_s is None:
        overlap_s = min(_OVERLAP_S, predictor.max_seconds / 3)
    if not 0 <= 2 * overlap_s <= predictor.max_seconds:
        raise ValueError(
            f"overlap_s={overlap_s:g} must be from 0 to half of the {predictor.max_seconds:g} s of the model."
        )
    rate_hz = predictor.sample_rate_hz
    half = int(overlap_s / 2 * rate_hz)
    cuts = quiet_cuts(wave, rate_hz, int(predictor.max_seconds * rate_hz), half)
    starts = [0, *(cut - half for cut in cuts)]
    ends = [*(cut + half for cut in cuts), len(wave)]
    heard: list[Transcript] = []
    for first in range(0, len(starts), _AT_ONCE):
        borders = zip(starts[first : first + _AT_ONCE], ends[first : first + _AT_ONCE], strict=True)
        heard += predictor.transcribe([wave[start:end] for start, end in borders], timestamps=True)
    chunks = [_shifted(one.words, start / rate_hz) for one, start in zip(heard, starts, strict=True)]
    words: list[Word] = []
    chunk = chunks[0]
    for cut, following in zip(cuts, chunks[1:], strict=True):
        stop, start = _seam(chunk, following, cut / rate_hz)
        _append(words, chunk[:stop])
        chunk = following[start:]
    _append(words, chunk)
    return _transcript(words, float(np.mean([one.confidence for one in heard])))


def transcribe_all(predictor: WhisperPredictor, waves: Sequence[Wave]) -> list[Transcript]:
    """Transcribe mono float32[N] samples of any length, in order: those that the model takes whole as one batch.

    Raises:
        AudioError: a wave is empty.
    """
    limit = predictor.max_seconds * predictor.sample_rate_hz
    whole = iter(predictor.transcribe([wave for wave in waves if len(wave) <= limit]))
    return [next(whole) if len(wave) <= limit else transcribe_long(predictor, wave) for wave in waves]


@dataclass(frozen=True)
class Update:
    """All words that are confirmed so far, and the text that may still change."""

    confirmed: tuple[Word, ...]
    partial: str


class Streaming:
    """Transcribes audio while it arrives, by LocalAgreement-2 (Macháček, Dabre and Bojar, 2023, section 3).

    What isn't confirmed yet is transcribed anew with every `step_s` of audio, and words on which two transcripts in
    succession agree are confirmed, for good. At most `max_seconds` of audio are kept: the oldest goes up to the last
    confirmed word, which stays as context, and words that would have to go unconfirmed are confirmed as they are. The
    result doesn't depend on how the audio is divided among the calls of `feed`. Not safe for threads.

    Raises:
        ValueError: `step_s` is not positive or more than half of what the model takes.
    """

    def __init__(self, predictor: WhisperPredictor, *, step_s: float = 0.5) -> None:
        self._predictor = predictor
        self._rate_hz = predictor.sample_rate_hz
        self._limit = int(predictor.max_seconds * self._rate_hz)
        self._step = int(step_s * self._rate_hz)
        if not 1 <= self._step <= self._limit // 2:
            raise ValueError(f"step_s={step_s:g} must be above 0 and at most half of {predictor.max_seconds:g} s.")
        self._buffer = np.zeros(0, np.float32)
        self._dropped = 0
        self._confirmed: list[Word] = []
        self._partial: list[Word] = []
        self._confidence = 0.0

    def feed(self, samples: Wave) -> Update:
        """Take the next mono float32[N] samples at the model's `sample_rate_hz`; times count from the first one fed."""
        while len(samples):
            missing = self._step - (self._dropped + len(self._buffer)) % self._step
            self._buffer = np.concatenate([self._buffer, samples[:missing]])
            if len(samples) >= missing:
                self._advance()
            samples = samples[missing:]
        return Update(tuple(self._confirmed), " ".join(word.text for word in self._partial))

    def finish(self) -> Transcript:
        """Transcribe the rest and confirm it; confidence as of `transcribe_long`.

        Raises:
            AudioError: nothing was fed.
        """
        _append(self._confirmed, self._transcribe())
        return _transcript(self._confirmed, self._confidence)

    def _advance(self) -> None:
        words = self._transcribe()
        agreed = sum(1 for _ in takewhile(lambda pair: _alike(*pair), zip(words, self._partial, strict=False)))
        _append(self._confirmed, words[:agreed])
        self._partial = words[agreed:]
        self._forget()

    def _transcribe(self) -> list[Word]:
        """The words of the buffer that come after the confirmed ones."""
        (heard,) = self._predictor.transcribe([self._buffer], timestamps=True)
        self._confidence = heard.confidence
        words = _shifted(heard.words, self._dropped / self._rate_hz)
        return words[_known(self._confirmed, words) :]

    def _forget(self) -> None:
        """Where the next step would make the buffer too long, drop what is before the last confirmed word."""
        end = self._dropped + len(self._buffer)
        oldest = end + self._step - self._limit
        if self._dropped >= oldest:
            return
        lost = sum(word.start_s * self._rate_hz < oldest for word in self._partial)
        _append(self._confirmed, self._partial[:lost])
        self._partial = self._partial[lost:]
        borders = [int(at_s * self._rate_hz) for word in self._confirmed[-1:] for at_s in (word.start_s, word.end_s)]
        start = next((border for border in borders if oldest <= border < end), oldest)
        self._buffer = self._buffer[start - self._dropped :]
        self._dropped = start


def _seam(left: Sequence[Word], right: Sequence[Word], cut_s: float) -> tuple[int, int]:
    """How many words of `left` to take, and how many of `right` to leave out, where both heard what is around a cut."""
    both = [(place, same) for place, word in enumerate(left) if (same := _same(word, right)) is not None]
    if both:
        place, same = min(both, key=lambda pair: abs(_middle_s(left[pair[0]]) - cut_s))
        return place + 1, same + 1
    taken = [word for word in left if _middle_s(word) < cut_s]
    return len(taken), sum(word.end_s <= cut_s or _is_within(word, taken) for word in right)


def _known(known: Sequence[Word], words: Sequence[Word]) -> int:
    """How many of the words are up to the last known one, which is found by its text or else by its time."""
    same = _same(known[-1], words) if known else None
    return sum(_is_within(word, known) for word in words) if same is None else same + 1


def _is_within(word: Word, known: Sequence[Word]) -> bool:
    """Whether most of a word is said before the last known one ends."""
    return bool(known) and _middle_s(word) < known[-1].end_s


def _same(word: Word, others: Sequence[Word]) -> int | None:
    """The place of the same word in another transcript of the same audio, if it is there.

    It has the same letters, and the middle of one lies within the other; the nearest, where there are several.
    """
    middle_s = _middle_s(word)
    found = [
        (abs(_middle_s(other) - middle_s), place)
        for place, other in enumerate(others)
        if _alike(word, other)
        and (word.start_s <= _middle_s(other) <= word.end_s or other.start_s <= middle_s <= other.end_s)
    ]
    return min(found)[1] if found else None


def _alike(left: Word, right: Word) -> bool:
    return _letters(left) == _letters(right)


def _letters(word: Word) -> str:
    """The text without case and punctuation, which a model changes when it hears how the sentence goes on."""
    return "".join(filter(str.isalnum, word.text.casefold())) or word.text


def _middle_s(word: Word) -> float:
    return (word.start_s + word.end_s) / 2


def _shifted(words: Sequence[Word], by_s: float) -> list[Word]:
    return [replace(word, start_s=word.start_s + by_s, end_s=word.end_s + by_s) for word in words]


def _append(words: list[Word], more: Sequence[Word]) -> None:
    """Add words of another transcript; where its times differ a little, they begin when the word before has ended."""
    for word in more:
        start_s = max(word.start_s, words[-1].end_s) if words else word.start_s
        words.append(replace(word, start_s=start_s, end_s=max(word.end_s, start_s)))


def _transcript(words: Sequence[Word], silent: float) -> Transcript:
    confidence = float(np.mean([word.confidence for word in words])) if words else silent
    return Transcript(" ".join(word.text for word in words), confidence, tuple(words))
