"""Evaluation of a Whisper configuration: its held-out utterances, sliced by the features that Feast has of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from glob import glob
from math import isnan
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import ray
from feast import FeatureStore, FileSource
from feast.errors import FeastObjectNotFoundException
from ray.exceptions import RayTaskError

from evaluation.assessment import Evaluation, assess
from evaluation.batch import Split, System, batches
from evaluation.inference import Candidate, InferenceError, candidates, joined, transcribe
from evaluation.metrics import Metric, metric
from evaluation.metrics.term_recall import TermRecall
from evaluation.statistics import Resampling
from models.registry import BASELINE, Registry
from models.whisper.config import RecordingsConfig, WhisperConfig
from models.whisper.data import splits
from models.whisper.utterances import Splits, Utterance, write_features

TASK_CPUS = 0.5
TASK_UTTERANCES = 512  # enough to repay the seconds in which a process imports torch
UNKNOWN = "unknown"
KEY = "utterance_id"


class FeaturesError(ValueError):
    """Features that cannot be read, in one sentence; the split can still be evaluated without slices."""


def evaluate(config: WhisperConfig, data: Path | None, repo: Path, tracking_uri: str, home: Path) -> Evaluation:
    """Transcribe the held-out split with champion and baseline, as tasks of the running Ray, and score them.

    Features are read while the models transcribe; where that cannot be, the notes say why and there are no slices.

    Raises:
        RegistryError: no champion is registered.
        DataError: there is no such data.
        InferenceError: a model cannot transcribe it.
    """
    chosen = candidates(Registry(tracking_uri), config.registered_name, config.evaluate.preprocess)
    found = splits(config.data, data, home)
    write_features(found, home / "features" / "offline" / "utterance_audio")
    held_out = found.test[: config.evaluate.max_utterances]
    beside = chosen[0].version.split_hash
    pending = [_submit(candidate, tracking_uri, home / "models", held_out) for candidate in chosen]
    notes = [
        "Whole sentences are resampled, each with all its conditions: intervals cover new sentences, not new speakers.",
        "References and transcripts are compared in lower case.",
    ]
    if beside != found.hash:
        notes.append(f"The champion was trained beside another test split ({beside}): it may have heard these samples.")
    known: Mapping[str, Mapping[str, Any]] = {}
    if config.evaluate.feature_service is not None:
        try:
            known = features(repo, config.evaluate.feature_service, [one.id for one in held_out])
        except FeaturesError as error:
            notes.append(f"No slices: {error}")
    missing = sum(one.id not in known for one in held_out)
    notes.append(f"{len(held_out) - missing} of {len(held_out)} utterances have features in Feast.")
    systems = [_collect(parts) for parts in pending]
    settings = config.evaluate
    assessment = assess(
        split(held_out, found, known),
        systems,
        metrics(config, found),
        baseline=BASELINE if len(systems) > 1 else None,
        resampling=Resampling(settings.replicates, settings.seed, settings.level),
    )
    counts = {"features_found": len(held_out) - missing, "features_missing": missing}
    return Evaluation(config.registered_name, assessment, notes, counts)


def split(held_out: Sequence[Utterance], found: Splits, features: Mapping[str, Mapping[str, Any]]) -> Split:
    """Make the split to score; `features` are those of each utterance by its id; without any there are no slices."""
    whole = len(held_out) == len(found.test)
    return Split(
        name=f"{len(held_out)} held-out utterances ({found.source})",
        hash=found.hash if whole else f"{found.hash}-first-{len(held_out)}",
        ids=[one.id for one in held_out],
        references=[one.text.lower() for one in held_out],
        groups=[one.unit for one in held_out],
        slices=slices([features.get(one.id, {}) for one in held_out]),
    )


def metrics(config: WhisperConfig, found: Splits) -> list[Metric]:
    """The error rates, and the recall of terms where the domain has some; orders have no transcripts, only terms."""
    recall: list[Metric] = [TermRecall(found.terms)] if found.terms else []
    if isinstance(config.data, RecordingsConfig) and config.data.layout == "orders":
        return recall
    return [metric("wer"), metric("cer"), *recall]


def features(repo: Path, service: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read a feature service's newest values of utterances: id -> feature -> value, only those that are known.

    Raises:
        FeaturesError: the service is not applied, or nothing has been written for it yet.
    """
    store = FeatureStore(repo_path=str(repo))
    try:
        found = store.get_feature_service(service)
    except (FeastObjectNotFoundException, FileNotFoundError):
        raise FeaturesError(f"Feature service {service} of {repo} is not applied: run `feast apply` there.") from None
    for projection in found.feature_view_projections:
        source = store.get_feature_view(projection.name).batch_source
        if isinstance(source, FileSource) and not glob(source.path):
            raise FeaturesError(f"Nothing is logged at {source.path} for feature service {service}: train first.")
    rows = pd.DataFrame({KEY: list(ids), "event_timestamp": datetime.now(UTC)})
    table = store.get_historical_features(entity_df=rows, features=found).to_df().set_index(KEY)
    names = [feature.name for projection in found.feature_view_projections for feature in projection.features]
    return {
        str(key): known
        for key, row in table[names].to_dict("index").items()
        if (known := {str(name): value for name, value in row.items() if not _missing(value)})
    }


def slices(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Label each sample in each feature: a text by itself, a number by its side of the median, else `unknown`.

    A feature in which all samples are alike is left out.
    """
    labels: dict[str, list[str]] = {}
    for name in sorted({name for row in rows for name in row}):
        values = [row.get(name) for row in rows]
        known = [value for value in values if value is not None]
        if all(isinstance(value, (int, float)) for value in known):
            middle = float(median(known))
            labels[name] = [UNKNOWN if value is None else _side(value, middle) for value in values]
        else:
            labels[name] = [UNKNOWN if value is None else str(value) for value in values]
    return {name: column for name, column in labels.items() if len(set(column)) > 1}


def _submit(
    candidate: Candidate, tracking_uri: str, cache: Path, held_out: Sequence[Utterance]
) -> "list[ray.ObjectRef[System]]":
    task = ray.remote(num_cpus=TASK_CPUS)(transcribe)
    return [task.remote(tracking_uri, candidate, cache, part) for part in batches(held_out, TASK_UTTERANCES)]


def _collect(parts: "list[ray.ObjectRef[System]]") -> System:
    try:
        system = joined(ray.get(parts))
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise InferenceError(str(error.cause)) from None
        raise
    return replace(system, predictions=[text.lower() for text in system.predictions])


def _side(value: float, middle: float) -> str:
    return f"up to {middle:.3g}" if value <= middle else f"above {middle:.3g}"


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and isnan(value))
