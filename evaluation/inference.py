"""Answers of registered models: which versions are evaluated, and their transcriptions batch by batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from evaluation.batch import System, run
from models import predictor
from models.registry import BASELINE, CHAMPION, ModelVersion, Registry
from models.whisper.audio import resample
from models.whisper.preprocess import PreprocessConfig
from models.whisper.utterances import Utterance

if TYPE_CHECKING:  # importing it imports torch, which only the process that transcribes needs
    from models.whisper.predict import WhisperPredictor

BATCH_SIZE = 16


class InferenceError(ValueError):
    """A registered model that cannot answer this split, in one sentence."""


@dataclass(frozen=True)
class Candidate:
    """A registered version under the name that it is evaluated as; `preprocess` replaces its own steps."""

    name: str
    version: ModelVersion
    preprocess: PreprocessConfig | None = None


def candidates(registry: Registry, name: str, preprocess: Sequence[PreprocessConfig] = ()) -> list[Candidate]:
    """Return the champion and, where there is one, the baseline; then the champion with each of other steps.

    Raises:
        RegistryError: no champion is registered under this name.
    """
    aliases = [CHAMPION] + ([BASELINE] if (name, BASELINE) in registry.aliases() else [])
    found = [Candidate(alias, registry.resolve(name, alias)) for alias in aliases]
    return found + [Candidate(f"{CHAMPION}: {steps.label}", found[0].version, steps) for steps in preprocess]


def transcribe(tracking_uri: str, candidate: Candidate, cache: Path, utterances: Sequence[Utterance]) -> System:
    """Load the candidate's model and transcribe every utterance; runs alone in any process that reaches the registry.

    Raises:
        InferenceError: the model is of another task.
        AudioError: an utterance is empty.
    """
    from models.whisper.longform import transcribe_all

    version = candidate.version
    loaded = predictor.load(Registry(tracking_uri).download(version, cache))
    if loaded.task != "whisper":
        raise InferenceError(f"{version.name} version {version.version} is a {loaded.task} model, none for speech.")
    whisper = cast("WhisperPredictor", loaded)
    if candidate.preprocess is not None:
        whisper.preprocess = candidate.preprocess
    return run(
        candidate.name,
        f"{version.name} version {version.version}",
        lambda waves: [transcript.text for transcript in transcribe_all(whisper, waves)],
        [resample(one.wave, one.sample_rate_hz, whisper.sample_rate_hz) for one in utterances],
        BATCH_SIZE,
    )


def joined(parts: Sequence[System]) -> System:
    """Join the answers to consecutive parts of one split, given in their order; seconds add up."""
    predictions = [prediction for part in parts for prediction in part.predictions]
    return System(parts[0].name, parts[0].version, predictions, sum(part.seconds or 0.0 for part in parts))
