"""Recorded sentences in a folder, heard with and without noise; no recording is in two splits."""

import csv
import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from models.whisper import sentences
from models.whisper.audio import AudioError, decode
from models.whisper.conditions import Noises, Noisy
from models.whisper.config import RecordingsConfig
from models.whisper.utterances import DataError, Splits, Utterance, content_hash

logger = logging.getLogger(__name__)

SUBSET = "recorded"
_OTHER = re.compile(r"(?:[^\w' ]|_)+")


def splits(config: RecordingsConfig, data: Path | None) -> Splits:
    """Read the recordings, and split them by a hash of their names; noise is added to validation and test.

    Raises:
        DataError: no data folder, a folder of another layout, or too few recordings.
        NoiseError: a noise can't be read.
    """
    if data is None or not (data / config.folder).is_dir():
        raise DataError(f"{config.folder}: not found; set MILLRACE_DATA to the folder that holds it.")
    noises = Noises.open(config.noise, data, config.sample_rate_hz)
    conditions = list(noises.conditions())
    read = _lines if config.layout == "ljspeech" else _orders
    found: list[Utterance] = []
    skipped = 0
    longest = (config.max_seconds - 2 * config.noise.margin_s[1]) * config.sample_rate_hz
    for path, text in read(data / config.folder):
        try:
            if not text:
                raise AudioError("its transcript has no words")
            wave = decode(path.read_bytes(), config.sample_rate_hz)
            if len(wave) > longest:
                raise AudioError(
                    f"it lasts {len(wave) / config.sample_rate_hz:.1f} s, longer than data.max_seconds allows"
                )
        except (AudioError, OSError) as error:
            skipped += 1
            logger.warning(json.dumps({"event": "recording skipped", "path": str(path), "reason": str(error)}))
            continue
        found.append(Utterance(path.stem, wave, text, SUBSET, config.sample_rate_hz, SUBSET))
    found.sort(key=lambda one: hashlib.sha256(f"{config.seed}/{one.id}".encode()).digest())
    tested = max(1, round(config.test_share * len(found)))
    validated = max(1, min(config.validation_utterances, tested // 4, (len(found) - tested) // 2))
    if len(found) < tested + validated + 1:
        raise DataError(f"{config.folder}: {len(found)} recordings ({skipped} skipped) are too few for three splits.")
    test = tuple(
        noises.held_out(one, "test", name, snr_db, [config.seed, number, place])
        for number, one in enumerate(found[:tested])
        for place, (name, snr_db) in enumerate(conditions)
    )
    validation = tuple(
        noises.held_out(one, "validation", *conditions[number % len(conditions)], [config.seed, number])
        for number, one in enumerate(found[tested : tested + validated])
    )
    return Splits(
        train=Noisy(found[tested + validated :], noises, {SUBSET: 1.0}),
        validation=validation,
        test=test,
        source=config.folder,
        hash=content_hash(test),
        skipped=skipped,
        terms=sentences.named("coffee").terms if config.layout == "orders" else (),
    )


def _lines(folder: Path) -> Iterator[tuple[Path, str]]:
    """Recordings and transcripts of the layout of LJSpeech, in lower case and without punctuation."""
    path = folder / "metadata.csv"
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines(), delimiter="|", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error}); it holds id|text|normalised text.") from None
    for row in rows:
        if len(row) >= 2:
            yield folder / "wavs" / f"{row[0]}.wav", spoken(row[-1])


def _orders(folder: Path) -> Iterator[tuple[Path, str]]:
    """Recordings and the phrases that must be heard in them, one after the other."""
    path = folder / "label.json"
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
        phrases = {name: " ".join(label["slots"].values()) for name, label in sorted(labels.items())}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: can't be read ({error}); it holds an object of names with their slots.") from None
    for name, text in phrases.items():
        yield folder / "clean" / name, spoken(text)


def spoken(text: str) -> str:
    """A transcript as error rates compare it: lower case, letters of any language, digits, apostrophes, one space."""
    return " ".join(_OTHER.sub(" ", unicodedata.normalize("NFC", text).lower().replace("’", "'")).split())
