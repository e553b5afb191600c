"""Loads a tabular model's folder and predicts from named columns of features."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import skops.io
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier

from models.tabular.train import MODEL_FILE

TRUSTED_TYPES = ["sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor"]
"""What a file may construct beyond skops' own safe list: scikit-learn's tree of plain arrays."""


class TabularError(ValueError):
    """A folder that is no tabular model, or inputs that don't fit it, in one sentence."""


class TabularPredictor:
    """A fitted classifier with the names of its inputs."""

    task = "tabular"

    def __init__(
        self,
        classifier: HistGradientBoostingClassifier,
        *,
        feature_service: str,
        features: tuple[str, ...],
        threshold: float,
    ) -> None:
        self.feature_service = feature_service
        self.features = features
        self.threshold = threshold
        self._classifier = classifier

    def predict(self, rows: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """The probability of the positive class, one a row.

        Args:
            rows: a column of N values for each of `features`, NaN where missing; other columns are ignored.

        Raises:
            TabularError: a column is absent, not numeric, or not as long as the others.
        """
        absent = [name for name in self.features if name not in rows]
        if absent:
            raise TabularError(f"The model needs {', '.join(absent)} too: give NaN for a value that is not known.")
        try:
            columns = [np.asarray(rows[name], dtype=np.float64) for name in self.features]
        except (TypeError, ValueError):
            raise TabularError(f"The model takes numbers only for {', '.join(self.features)}.") from None
        if {column.shape for column in columns} != {(len(columns[0]),)}:
            raise TabularError("The model takes flat columns of equal length, one value a row.")
        if not len(columns[0]):
            return np.empty(0)
        probabilities: NDArray[np.float64] = self._classifier.predict_proba(np.column_stack(columns))[:, 1]
        return probabilities


def load(folder: Path) -> TabularPredictor:
    """Load a folder that `models.tabular.train.save` wrote; no code in it is run.

    Raises:
        TabularError: a file is missing, damaged, or holds a type that is not trusted.
    """
    try:
        description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        classifier = skops.io.load(folder / MODEL_FILE, trusted=TRUSTED_TYPES)
        return TabularPredictor(
            classifier,
            feature_service=description["feature_service"],
            features=tuple(description["features"]),
            threshold=float(description["threshold"]),
        )
    except Exception as error:  # a damaged archive raises what zipfile, json and skops each think fit
        raise TabularError(f"{folder}: is not a tabular model ({type(error).__name__}: {error}).") from None
