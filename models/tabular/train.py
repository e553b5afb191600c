"""Trains a gradient-boosted classifier, chooses its threshold, measures it, and saves it as a model folder.

Histogram gradient boosting takes NaN as a value of its own, so an entity without features needs no imputing, and
trees need no scaling.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skops.io
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, roc_auc_score

from models.tabular.config import TabularConfig, TrainConfig
from models.tabular.data import Examples, Splits

MODEL_FILE = "model.skops"


@dataclass(frozen=True)
class Trained:
    """A fitted classifier, the threshold that maximises F1 on the validation split, and metrics of the test split."""

    classifier: HistGradientBoostingClassifier
    threshold: float
    metrics: Mapping[str, float]


def train(splits: Splits, config: TrainConfig) -> Trained:
    """Fit on the training split; the validation split decides when to stop and the threshold, the test one nothing."""
    classifier = HistGradientBoostingClassifier(
        learning_rate=config.learning_rate,
        max_iter=config.max_iter,
        max_leaf_nodes=config.max_leaf_nodes,
        min_samples_leaf=config.min_samples_leaf,
        l2_regularization=config.l2_regularization,
        early_stopping=True,
        n_iter_no_change=config.patience,
        random_state=config.seed,
    )
    # scikit-learn can't bin a feature that nobody has; as a constant it is never split on, whatever it is later.
    never_known = np.isnan(splits.train.inputs).all(axis=0)
    inputs = np.where(never_known, 0.0, splits.train.inputs)
    validation = splits.validation
    classifier.fit(inputs, splits.train.labels, X_val=validation.inputs, y_val=validation.labels)
    threshold = best_threshold(validation.labels, classifier.predict_proba(validation.inputs)[:, 1])
    test = splits.test
    metrics = measure(test.labels, classifier.predict_proba(test.inputs)[:, 1], threshold)
    return Trained(classifier, threshold, metrics | _prior_baseline(splits.train, test))


def best_threshold(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """The score from which on a row counts as positive so that F1 is largest."""
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision[:-1] * recall[:-1] / np.maximum(precision[:-1] + recall[:-1], 1e-12)
    return float(thresholds[int(np.argmax(f1))])


def measure(labels: NDArray[np.bool_], scores: NDArray[np.float64], threshold: float) -> dict[str, float]:
    """Areas under the ROC and the precision-recall curve, and F1 at the threshold."""
    return {
        "auroc": float(roc_auc_score(labels, scores)),
        "auprc": float(average_precision_score(labels, scores)),
        "f1": float(f1_score(labels, scores >= threshold)),
    }


def save(folder: Path, trained: Trained, splits: Splits, config: TabularConfig) -> None:
    """Write the model's folder: `model.json` and the classifier in skops' format.

    Skops and not pickle: loading it runs no code from the file, only constructors of types that the reader trusts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    skops.io.dump(trained.classifier, folder / MODEL_FILE)
    description = {
        "task": "tabular",
        "feature_service": config.data.feature_service,
        "features": list(splits.features),
        "label": config.data.label,
        "threshold": trained.threshold,
        "metrics": dict(trained.metrics),
        "data_hash": splits.hash,
    }
    (folder / "model.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _prior_baseline(train: Examples, test: Examples) -> dict[str, float]:
    """A constant score, the share of positives in training; its F1 is that of calling every row positive."""
    prior = float(train.labels.mean())
    measured = measure(test.labels, np.full(len(test.labels), prior), prior)
    return {f"baseline_{name}": value for name, value in measured.items()}
