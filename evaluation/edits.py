"""Evaluation of a tabular configuration: AUROC on the held-out entities, resampled by entity."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from feast import FeatureStore
from numpy.typing import NDArray

from evaluation.assessment import Evaluation, assess
from evaluation.batch import Split, System, run
from evaluation.metrics import metric
from models import predictor
from models.registry import BASELINE, CHAMPION, ModelVersion, Registry
from models.tabular.config import TabularConfig
from models.tabular.data import Splits, load
from models.tabular.predict import TabularPredictor

METRICS = ("auroc",)
BATCH_SIZE = 4096


def evaluate(
    config: TabularConfig, bootstrap_servers: str | None, repo: Path, tracking_uri: str, cache: Path
) -> Evaluation:
    """Score the champion beside the share of positives; the rows are made anew from the topic and its features.

    Raises:
        RegistryError: no champion is registered.
        DataError: the topic, or the features of its events, cannot be read.
    """
    registry = Registry(tracking_uri)
    version = registry.resolve(config.name, CHAMPION)
    model = predictor.load(registry.download(version, cache))
    splits = load(FeatureStore(repo_path=str(repo)), config.data, bootstrap_servers)
    assessment = assess(
        split(config.name, splits),
        systems(version, cast(TabularPredictor, model), splits),
        [metric(name) for name in METRICS],
        baseline=BASELINE,
    )
    return Evaluation(config.name, assessment, ["All rows of an entity are resampled together."], {})


def split(name: str, splits: Splits) -> Split:
    """Make the split to score; rows of one entity are resampled together, since they are alike."""
    test = splits.test
    return Split(
        name=f"{len(test.entities)} held-out rows of {len(set(test.entities))} entities ({name})",
        hash=splits.hash,
        ids=[f"{entity}#{row}" for row, entity in enumerate(test.entities)],
        references=[int(label) for label in test.labels],
        groups=test.entities,
    )


def systems(version: ModelVersion, model: TabularPredictor, splits: Splits) -> list[System]:
    """Return the model's probabilities, and as a baseline the share of positives in training for every row."""
    prior = float(splits.train.labels.mean())
    rows = list(splits.test.inputs)

    def probabilities(batch: Sequence[NDArray[np.float64]]) -> list[float]:
        columns = dict(zip(splits.features, np.stack(batch).T, strict=True))
        return [float(value) for value in model.predict(columns)]

    return [
        run(CHAMPION, f"{version.name} version {version.version}", probabilities, rows, BATCH_SIZE),
        System(BASELINE, "share of positives in training", [prior] * len(rows)),
    ]
