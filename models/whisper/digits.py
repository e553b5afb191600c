"""Utterances of spoken digits: real recordings or synthetic speech, split so that nothing leaks.

Single digits form three pools: the test pool has recordings, or a speaker, of its own, and validation other recordings
of the speakers who are heard in training. Validation and test are sequences drawn once from their pools by the seed;
training draws new sequences in every epoch.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.whisper.audio import AudioError, decode, resample
from models.whisper.config import DigitsConfig
from models.whisper.speech import SAMPLE_RATE_HZ, Spoken, synthesise
from models.whisper.utterances import DataError, Splits, Utterance, content_hash

logger = logging.getLogger(__name__)

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NAME = re.compile(r"(\d)_([^_]+)_(\d+)\.wav")


@dataclass(frozen=True)
class Digit:
    """One recorded or synthetic digit."""

    wave: NDArray[np.float32]
    word: str
    speaker: str
    index: int


def splits(config: DigitsConfig, data: Path | None) -> Splits:
    """Load or synthesise the digits and split them.

    Args:
        config: what to load; the same values give the same splits.
        data: the folder of real data sets, or None where there is none.

    Raises:
        DataError: the data folder or its recordings are missing, or too few to split.
    """
    folder = _recordings(config, data)
    digits, skipped = _read(folder, config.sample_rate_hz) if folder else (_synthesise(config), 0)
    source = "recordings" if folder else "synthetic"
    if config.split == "speaker":
        test, rest = _of_speakers(digits, config.test_speaker)
    else:
        test, rest = _first_tenth(digits, "index")
    validation, train = _first_tenth(rest, "index")
    if not train:
        raise DataError(f"{source}: too few to split by {config.split}: 3 recordings are needed, or 2 of 2 speakers.")
    synthetic = _synthesise(config) if folder and config.synthetic_share else []
    tested = _held_out(test, config, "test", config.test_utterances)
    return Splits(
        train=Sequences(_singles(train, config), config, synthetic=_singles(synthetic, config)),
        validation=_held_out(validation, config, "validation", config.validation_utterances),
        test=tested,
        source=source,
        hash=content_hash(tested),
        skipped=skipped,
    )


class Sequences:
    """Utterances concatenated from a pool of single digits, each by one speaker, with random silences.

    The utterance of a key is always the same; `config.digits` says how many digits it has, fewer only where they
    would be longer than `config.max_seconds`.
    """

    def __init__(
        self, recorded: Sequence[Utterance], config: DigitsConfig, synthetic: Sequence[Utterance] = ()
    ) -> None:
        self.utterances = (*recorded, *synthetic)
        self._recorded, self._synthetic = _by_speaker(recorded), _by_speaker(synthetic)
        self._config = config

    def draw(self, rng: np.random.Generator, epoch: int) -> Utterance:
        """Concatenate digits as the generator says; the id is empty.

        The first epoch has single digits, and each one after it a digit more, up to the configured length: a network
        that first learns what a digit sounds like learns much sooner where in a sequence to listen.
        """
        synthetic = self._synthetic and rng.random() < self._config.synthetic_share
        speakers = self._synthetic if synthetic else self._recorded
        speaker = str(rng.choice(list(speakers)))
        pool = speakers[speaker]
        fewest, longest = self._config.digits
        longest = min(longest, 1 + epoch)
        rate_hz = self._config.sample_rate_hz
        room = self._config.max_seconds * rate_hz
        pieces: list[NDArray[np.float32]] = [self._silence(rng)]
        words: list[str] = []
        for position in rng.integers(len(pool), size=int(rng.integers(min(fewest, longest), longest + 1))):
            digit, gap = pool[position], self._silence(rng)
            if words and sum(map(len, pieces)) + len(digit.wave) + len(gap) > room:
                break
            pieces += [digit.wave, gap]
            words.append(digit.text)
        return Utterance("", np.concatenate(pieces)[:room], " ".join(words), speaker, rate_hz)

    def _silence(self, rng: np.random.Generator) -> NDArray[np.float32]:
        return np.zeros(round(rng.uniform(*self._config.gap_s) * self._config.sample_rate_hz), np.float32)


def _by_speaker(digits: Sequence[Utterance]) -> Mapping[str, Sequence[Utterance]]:
    speakers: dict[str, list[Utterance]] = {}
    for digit in digits:
        speakers.setdefault(digit.speaker, []).append(digit)
    return dict(sorted(speakers.items()))


def _recordings(config: DigitsConfig, data: Path | None) -> Path | None:
    """The folder of recordings, or None for synthetic speech."""
    if config.source == "synthetic":
        return None
    if data is not None and not data.is_dir():
        raise DataError(f"The data folder {data} doesn't exist; correct MILLRACE_DATA or leave it unset.")
    folder = data / config.folder / "recordings" if data is not None else None
    if folder is not None and folder.is_dir():
        return folder
    if config.source == "recordings":
        raise DataError(f"{folder or config.folder}: no recordings; set MILLRACE_DATA or data.source=synthetic.")
    return None


def _read(folder: Path, sample_rate_hz: int) -> tuple[list[Digit], int]:
    """The digits of a folder in the order of their names, and how many files had to be skipped."""
    digits: list[Digit] = []
    skipped = 0
    for path in sorted(folder.glob("*.wav")):
        try:
            name = _NAME.fullmatch(path.name)
            if name is None:
                raise AudioError("the name is not <digit>_<speaker>_<index>.wav")
            wave = decode(path.read_bytes(), sample_rate_hz)
        except (AudioError, OSError) as error:
            skipped += 1
            logger.warning(json.dumps({"event": "recording skipped", "path": str(path), "reason": str(error)}))
            continue
        digits.append(Digit(wave, WORDS[int(name[1])], name[2], int(name[3])))
    if not digits:
        raise DataError(f"{folder}: no recording can be read ({skipped} skipped); expected <digit>_<speaker>_<n>.wav.")
    return digits, skipped


def _synthesise(config: DigitsConfig) -> list[Digit]:
    kinds = [
        (Spoken(word, voice, rate_wpm, pitch=35 + 5 * (index % 7)), index)
        for voice in config.voices
        for index, rate_wpm in enumerate(config.rates_wpm)
        for word in WORDS
    ]
    waves = synthesise([spoken for spoken, _ in kinds])
    return [
        Digit(resample(wave, SAMPLE_RATE_HZ, config.sample_rate_hz), spoken.text, spoken.voice, index)
        for wave, (spoken, index) in zip(waves, kinds, strict=True)
    ]


def _of_speakers(digits: Sequence[Digit], name: str | None) -> tuple[list[Digit], list[Digit]]:
    """The digits of one speaker, or without a name of the first tenth, and the others."""
    if name is None:
        return _first_tenth(digits, "speaker")
    test, rest = [one for one in digits if one.speaker == name], [one for one in digits if one.speaker != name]
    if not test:
        speakers = ", ".join(sorted({one.speaker for one in digits}))
        raise DataError(f"data.test_speaker={name}: nobody of that name speaks a digit here; take one of {speakers}.")
    return test, rest


def _first_tenth(digits: Sequence[Digit], field: Literal["speaker", "index"]) -> tuple[list[Digit], list[Digit]]:
    """The digits of the first tenth of the speakers or recordings, and the others."""
    groups = sorted({getattr(digit, field) for digit in digits})
    first = frozenset(groups[: -(-len(groups) // 10)])
    return [one for one in digits if getattr(one, field) in first], [
        one for one in digits if getattr(one, field) not in first
    ]


def _singles(digits: Sequence[Digit], config: DigitsConfig) -> list[Utterance]:
    return [
        Utterance(f"{one.word}-{one.speaker}-{one.index}", one.wave, one.word, one.speaker, config.sample_rate_hz)
        for one in digits
    ]


def _held_out(pool: Sequence[Digit], config: DigitsConfig, part: str, count: int) -> tuple[Utterance, ...]:
    sequences = Sequences(_singles(pool, config), config)
    rng = np.random.default_rng([config.seed, len(part), count])
    drawn = (sequences.draw(rng, config.digits[1]) for _ in range(count))
    return tuple(replace(one, id=f"{part}-{number:04d}-{content_hash((one,))[:8]}") for number, one in enumerate(drawn))
