"""Word and character errors of transcripts: sums that add up over any part of a split."""

from collections.abc import Mapping, Sequence

from rapidfuzz.distance import Levenshtein

from models.whisper.audio import resample
from models.whisper.longform import transcribe_all
from models.whisper.predict import WhisperPredictor
from models.whisper.utterances import Utterance

BATCH = 32
Errors = Mapping[str, tuple[float, float]]
"""`wer` and `cer`, each as the number of edits and the length of the reference."""


def each_errors(predictor: WhisperPredictor, utterances: Sequence[Utterance]) -> list[Errors]:
    """The errors of each utterance, in order; case doesn't count."""
    found: list[Errors] = []
    for first in range(0, len(utterances), BATCH):
        part = utterances[first : first + BATCH]
        waves = [resample(one.wave, one.sample_rate_hz, predictor.sample_rate_hz) for one in part]
        for one, transcript in zip(part, transcribe_all(predictor, waves), strict=True):
            text, words = transcript.text.lower(), one.text.split()
            found.append(
                {
                    "wer": (float(Levenshtein.distance(words, text.split())), float(len(words))),
                    "cer": (float(Levenshtein.distance(one.text, text)), float(len(one.text))),
                }
            )
    return found


def errors(predictor: WhisperPredictor, utterances: Sequence[Utterance]) -> Errors:
    """The errors of all utterances together."""
    return sums(each_errors(predictor, utterances))


def sums(each: Sequence[Errors]) -> Errors:
    """The errors of several utterances together."""
    return {name: (sum(one[name][0] for one in each), sum(one[name][1] for one in each)) for name in ("wer", "cer")}


def rates_of(total: Errors) -> dict[str, float]:
    """Edits over length."""
    return {name: edits / length for name, (edits, length) in total.items()}


def by_subset(utterances: Sequence[Utterance], each: Sequence[Errors]) -> dict[str, float]:
    """The word error rate of every kind of sentence, apart without noise and with it."""
    kinds: dict[str, list[Errors]] = {}
    for one, edits in zip(utterances, each, strict=True):
        kinds.setdefault(f"{one.subset}, {'clean' if one.snr_db is None else 'noisy'}", []).append(edits)
    return {kind: rates_of(sums(part))["wer"] for kind, part in kinds.items()}
