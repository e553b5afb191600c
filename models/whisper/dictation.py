"""Synthetic dictation: sentences of a domain, and everyday ones, spoken by several voices at several speeds.

No sentence is in two splits. Every sentence of the test split is heard in every condition, by the same voice, so that
conditions differ by nothing else.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from models.whisper import sentences
from models.whisper.audio import resample
from models.whisper.conditions import Noises, Noisy
from models.whisper.config import DictationConfig
from models.whisper.speech import SAMPLE_RATE_HZ, Spoken, synthesise
from models.whisper.utterances import DataError, Splits, Utterance, content_hash

GENERAL = "general"
BATCH = 128
"""Texts that one process of espeak-ng speaks, which with their order decides the samples."""
PITCHES = (35, 65)
Wave = NDArray[np.float32]


class Speaker(Protocol):
    """Who speaks texts."""

    def speak(self, texts: Sequence[Spoken], sample_rate_hz: int) -> list[Wave]:
        """Samples float32[N] of each text, in order; the same texts give the same samples."""


def splits(config: DictationConfig, data: Path | None, speaker: Speaker) -> Splits:
    """Make the sentences, have them spoken, and split them; noise is added to validation and test.

    Raises:
        SentenceError: the domain hasn't so many sentences.
        DataError: a noise is a recording, and there is no data folder.
    """
    noises = Noises.open(config.noise, data, config.sample_rate_hz)
    conditions = list(noises.conditions())
    subsets = (config.domain,) if config.domain == GENERAL else (config.domain, GENERAL)
    planned = [one for subset in subsets for one in _planned(config, subset)]
    waves = speaker.speak([one.spoken for one in planned], config.sample_rate_hz)
    longest = round((config.max_seconds - 2 * config.noise.margin_s[1]) * config.sample_rate_hz)
    train: list[Utterance] = []
    validation: list[Utterance] = []
    test: list[Utterance] = []
    skipped = 0
    for number, (one, wave) in enumerate(zip(planned, waves, strict=True)):
        if len(wave) > longest:
            skipped += 1
            continue
        said = one.spoken
        clean = Utterance("", wave, said.text, f"{said.voice} {said.rate_wpm}", config.sample_rate_hz, one.subset)
        seed = [config.seed, number]
        if one.part == "train":
            train.append(clean)
        elif one.part == "validation":
            name, snr_db = conditions[number % len(conditions)]
            validation.append(noises.held_out(clean, one.part, name, snr_db, seed))
        else:
            test += [
                noises.held_out(clean, one.part, name, snr_db, [*seed, place])
                for place, (name, snr_db) in enumerate(conditions)
            ]
    replay = 1.0 if len(subsets) == 1 else config.replay
    shares = {GENERAL: replay} | ({config.domain: 1 - replay} if len(subsets) == 2 else {})
    return Splits(
        train=Noisy(train, noises, shares),
        validation=tuple(validation),
        test=tuple(test),
        source=f"synthetic {config.domain}",
        hash=content_hash(test),
        skipped=skipped,
        terms=sentences.named(config.domain).terms,
    )


@dataclass(frozen=True)
class Studio:
    """Speaks on the running Ray, through Ray Data, and keeps what was spoken as Parquet in a folder."""

    folder: Path

    def speak(self, texts: Sequence[Spoken], sample_rate_hz: int) -> list[Wave]:
        """Samples of each text, in order: read where they have been spoken before.

        Raises:
            DataError: they have not been spoken, and Ray isn't initialised.
            SpeechError: espeak-ng can't say one of them.
        """
        rows = [asdict(text) for text in texts]
        said = json.dumps([rows, sample_rate_hz, BATCH, version("espeakng-loader")]).encode()
        place = self.folder / hashlib.sha256(said).hexdigest()[:16]
        if not place.is_dir():
            self._record(rows, sample_rate_hz, place)
        table = pq.read_table(place).sort_by("place")
        return [column.values.to_numpy().astype(np.float32) / 32768.0 for column in table["samples"].combine_chunks()]

    def _record(self, rows: Sequence[Mapping[str, object]], sample_rate_hz: int, place: Path) -> None:
        import ray

        if not ray.is_initialized():
            raise DataError(f"{place}: this dictation isn't spoken yet; train with its configuration first.")
        batches = [
            {"first": first, "texts": json.dumps(rows[first : first + BATCH])} for first in range(0, len(rows), BATCH)
        ]
        unfinished = place.with_name(f".{place.name}.{os.getpid()}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        speak = partial(record, sample_rate_hz=sample_rate_hz)
        recorded = ray.data.from_items(batches).map_batches(speak, batch_size=1, batch_format="pyarrow", num_cpus=0.5)
        recorded.write_parquet(str(unfinished))
        try:
            os.rename(unfinished, place)
        except OSError:
            shutil.rmtree(unfinished)
            if not place.is_dir():
                raise


def record(batches: pa.Table, sample_rate_hz: int) -> pa.Table:
    """Speak the texts of batches: place int64, samples as a list of int16."""
    places: list[int] = []
    samples: list[NDArray[np.int16]] = []
    for batch in batches.to_pylist():
        texts = [Spoken(**text) for text in json.loads(batch["texts"])]
        for number, wave in enumerate(synthesise(texts)):
            resampled = resample(wave, SAMPLE_RATE_HZ, sample_rate_hz)
            places.append(batch["first"] + number)
            samples.append(np.clip(np.rint(resampled * 32768), -32768, 32767).astype(np.int16))
    return pa.table({"place": pa.array(places, pa.int64()), "samples": pa.array(samples, pa.list_(pa.int16()))})


@dataclass(frozen=True)
class _Planned:
    subset: str
    part: str
    spoken: Spoken


def _planned(config: DictationConfig, subset: str) -> Iterator[_Planned]:
    """Who says what, in which split; the words and phrases of which sentences are made are trained on alone as well.

    Two configurations that hold out equally many everyday sentences hold out the same ones, whatever their domains and
    however many they train on: what a base model was trained on is never in a test split of its adapters.
    """
    rng = np.random.default_rng([config.seed, list(sentences.DOMAINS).index(subset)])
    held_out = config.test_sentences + config.validation_utterances
    found = sentences.named(subset).sentences(config.sentences + held_out, rng)
    parts = ["test"] * config.test_sentences + ["validation"] * config.validation_utterances
    planned = list(zip([*parts, *["train"] * config.sentences], found, strict=True))
    planned += [("train", phrase) for phrase in sentences.named(subset).phrases]
    for part, text in planned:
        for _ in range(config.takes if part == "train" else 1):
            pitch = int(rng.integers(PITCHES[0], PITCHES[1] + 1))
            voice, rate_wpm = str(rng.choice(config.voices)), int(rng.choice(config.rates_wpm))
            yield _Planned(subset, part, Spoken(text, voice, rate_wpm, pitch))
