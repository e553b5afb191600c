"""What every source of speech gives: utterances, their splits, and their features in Feast."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

CLEAN = "clean"
RECORDED_AT = datetime(2000, 1, 1, tzinfo=UTC)


class DataError(ValueError):
    """Data that is missing or can't be split, in one sentence."""


@dataclass(frozen=True)
class Utterance:
    """Speech of one person: samples float32[N], and what is said.

    `subset` says what kind of sentence it is; `noise` and the ratio of speech to noise say how it is heard.
    """

    id: str
    wave: NDArray[np.float32]
    text: str
    speaker: str
    sample_rate_hz: int
    subset: str = "digits"
    noise: str = CLEAN
    snr_db: float | None = None

    @property
    def unit(self) -> str:
        """Speaker and words: a sentence is drawn with all its conditions of noise where intervals are estimated."""
        return f"{self.speaker}: {self.text}"


class Pool(Protocol):
    """What makes the utterances of training out of those that it has."""

    @property
    def utterances(self) -> Sequence[Utterance]:
        """All that it has, as they were recorded or synthesised."""

    def draw(self, rng: np.random.Generator, epoch: int) -> Utterance:
        """One utterance as the generator says; early epochs may have easier ones. The id may be empty."""


@dataclass(frozen=True)
class Splits:
    """Train is what training draws from; validation and test are heard as they are.

    `hash` identifies the test split by what it holds: two results with the same hash can be compared. `terms` are the
    words and phrases of the domain, none where it has none of its own.
    """

    train: Pool
    validation: tuple[Utterance, ...]
    test: tuple[Utterance, ...]
    source: str
    hash: str
    skipped: int
    terms: tuple[str, ...] = ()


def content_hash(utterances: Sequence[Utterance]) -> str:
    """16 hexadecimal digits of what is said and heard."""
    total = hashlib.sha256()
    for one in utterances:
        total.update(f"{one.id}\0{one.speaker}\0{one.text}\0{len(one.wave)}\0".encode())
        total.update(np.ascontiguousarray(one.wave, "<f4").tobytes())
    return total.hexdigest()[:16]


def utterance_features(utterances: Sequence[Utterance]) -> pa.Table:
    """The rows of the feature view `utterance_audio`: seconds, level in dB of full scale, speaker, and how it is heard.

    Noise, ratio and both together are named beside the subset, as in `field, wind 5 dB`. Recordings have no time of
    their own, so all have the same event timestamp, in the past.
    """
    now = datetime.now(UTC)
    rms = [float(np.sqrt(np.mean(np.square(one.wave, dtype=np.float64)))) for one in utterances]
    ratios = [CLEAN if one.snr_db is None else f"{one.snr_db:g} dB" for one in utterances]
    conditions = [
        one.noise if one.snr_db is None else f"{one.noise} {ratio}"
        for one, ratio in zip(utterances, ratios, strict=True)
    ]

    def beside_subset(labels: Sequence[str]) -> pa.Array:
        named = [f"{one.subset}, {label}" for one, label in zip(utterances, labels, strict=True)]
        return pa.array(named, pa.string())

    stamp = pa.timestamp("us", tz="UTC")
    return pa.table(
        {
            "utterance_id": pa.array([one.id for one in utterances], pa.string()),
            "duration_s": pa.array([len(one.wave) / one.sample_rate_hz for one in utterances], pa.float64()),
            "level_db": pa.array([20 * np.log10(max(level, 1e-9)) for level in rms], pa.float64()),
            "speaker": pa.array([one.speaker for one in utterances], pa.string()),
            "subset": pa.array([one.subset for one in utterances], pa.string()),
            "noise": beside_subset([one.noise for one in utterances]),
            "ratio": beside_subset(ratios),
            "condition": beside_subset(conditions),
            "event_timestamp": pa.array([RECORDED_AT] * len(utterances), stamp),
            "created_timestamp": pa.array([now] * len(utterances), stamp),
        }
    )


def write_features(held_out: Splits, folder: Path) -> Path:
    """Write the test split's features as one Parquet file named by the split's hash, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{held_out.hash}.parquet"
    partial = folder / f".{held_out.hash}.{os.getpid()}.partial"
    pq.write_table(utterance_features(held_out.test), partial)
    os.replace(partial, path)
    return path
