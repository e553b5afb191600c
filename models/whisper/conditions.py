"""With which noise, in which room, speech is heard: anew in every epoch of training, and fixed in a test split."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.whisper.config import NoiseConfig
from models.whisper.noise import NOISES, cut, load_noise, mix, reverberate, synthesise_noise
from models.whisper.utterances import CLEAN, DataError, Utterance, content_hash

TEST_SHARE = 0.25
TRAINING_NOISE_S = 180
EASY_EPOCHS = 8
"""Epochs over which the share of utterances in noise and rooms rises from none to all."""
Wave = NDArray[np.float32]


@dataclass(frozen=True)
class Noises:
    """The configured noises; recordings by name, each as its part for training and its part for tests."""

    config: NoiseConfig
    recordings: Mapping[str, tuple[Wave, Wave]]

    @classmethod
    def open(cls, config: NoiseConfig, data: Path | None, sample_rate_hz: int) -> "Noises":
        """Read the noises that are recordings.

        Raises:
            DataError: there is no data folder for them.
            NoiseError: one can't be read.
        """
        recorded: dict[str, tuple[Wave, Wave]] = {}
        for name in config.noises:
            if name in NOISES:
                continue
            if data is None:
                known = ", ".join(NOISES)
                raise DataError(f"The noise {name} is a recording: set MILLRACE_DATA, or use {known}.")
            wave = load_noise(data / name, sample_rate_hz)
            border = round(len(wave) * (1 - TEST_SHARE))
            recorded[name] = (wave[:border], wave[border:])
        return cls(config, recorded)

    def conditions(self) -> Iterator[tuple[str, float | None]]:
        """No noise, then every noise at every ratio in dB."""
        yield CLEAN, None
        for name in self.config.noises:
            for snr_db in self.config.snr_db:
                yield name, snr_db

    def held_out(self, one: Utterance, part: str, name: str, snr_db: float | None, seed: Sequence[int]) -> Utterance:
        """An utterance of a validation or test split under one condition, in no room, with an id of its own."""
        rng = np.random.default_rng(seed)
        wave = self._with_margins(one.wave, one.sample_rate_hz, rng)
        if snr_db is not None:
            wave = mix(wave, self._noise(name, len(wave), one.sample_rate_hz, rng, held_out=True), snr_db)
        heard = replace(one, wave=wave, noise=Path(name).stem, snr_db=snr_db)
        return replace(heard, id=f"{part}-{content_hash((heard,))}")

    def drawn(self, one: Utterance, rng: np.random.Generator, epoch: int) -> Utterance:
        """An utterance of training in a room and with a noise as the generator says."""
        config, rate_hz = self.config, one.sample_rate_hz
        wave = self._with_margins(one.wave, rate_hz, rng)
        if config.easy_start and rng.random() * EASY_EPOCHS >= epoch:
            return replace(one, wave=wave)
        if rng.random() < config.reverberant:
            wave = reverberate(wave, rate_hz, float(rng.uniform(*config.rt60_s)), rng)
        if rng.random() >= config.clean and config.noises:
            name, snr_db = str(rng.choice(config.noises)), float(rng.uniform(min(config.snr_db), max(config.snr_db)))
            noise = self._noise(name, len(wave), rate_hz, rng, held_out=False)
            wave = mix(wave, noise, snr_db)
        return replace(one, wave=wave)

    def _noise(self, name: str, samples: int, rate_hz: int, rng: np.random.Generator, *, held_out: bool) -> Wave:
        if name in self.recordings:
            return cut(self.recordings[name][held_out], samples, rng)
        if held_out:
            return synthesise_noise(name, samples, rate_hz, rng)
        return cut(_for_training(name, rate_hz), samples, rng)

    def _with_margins(self, wave: Wave, rate_hz: int, rng: np.random.Generator) -> Wave:
        before, after = (round(seconds * rate_hz) for seconds in rng.uniform(*self.config.margin_s, size=2))
        return np.pad(wave, (before, after))


class Noisy:
    """A pool of utterances heard with other noise every time; of several subsets, `shares` says how often each."""

    def __init__(self, utterances: Sequence[Utterance], noises: Noises, shares: Mapping[str, float]) -> None:
        self.utterances = utterances
        self._noises = noises
        self._shares = {subset: share for subset, share in shares.items() if share > 0}
        self._of = {subset: [one for one in utterances if one.subset == subset] for subset in self._shares}

    def draw(self, rng: np.random.Generator, epoch: int) -> Utterance:
        """One utterance with noise as the generator says."""
        ready = self._of[str(rng.choice(list(self._shares), p=list(self._shares.values())))]
        return self._noises.drawn(ready[rng.integers(len(ready))], rng, epoch)


@lru_cache
def _for_training(name: str, rate_hz: int) -> Wave:
    """Minutes of a noise, to cut from: making new noise for every utterance takes as long as training on it."""
    return synthesise_noise(name, TRAINING_NOISE_S * rate_hz, rate_hz, np.random.default_rng(NOISES.index(name)))
