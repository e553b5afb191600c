"""What the job makes of a task's held-out data: slices by features, rows grouped by entity, one code path."""

from collections.abc import Mapping
from typing import cast

import numpy as np
from numpy.typing import NDArray

from evaluation import edits, speech
from evaluation.assessment import assess
from evaluation.metrics import metric
from models.registry import ModelVersion
from models.tabular.data import Examples, Splits
from models.tabular.predict import TabularPredictor


class FirstColumn:
    """Stands for a fitted classifier, so that the right answer is known."""

    def predict(self, rows: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        return rows["activity"]


def test_slices_are_values_of_texts_and_sides_of_the_median_of_numbers() -> None:
    rows = [{"speaker": "ann", "duration_s": 1.0}, {"speaker": "bob", "duration_s": 3.0}, {"duration_s": 2.0}, {}]
    assert speech.slices(rows) == {
        "duration_s": ["up to 2", "above 2", "up to 2", "unknown"],
        "speaker": ["ann", "bob", "unknown", "unknown"],
    }
    assert speech.slices([{}, {}]) == {}


def test_rows_of_one_entity_are_resampled_together_and_the_baseline_knows_nothing() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 4 == 0
    inputs = np.column_stack([labels + rng.normal(0, 0.1, 200), rng.normal(size=200)])
    test = Examples(inputs, labels, tuple(f"user {row // 5}" for row in range(200)))
    splits = Splits(train=test, validation=test, test=test, features=("activity", "noise"), hash="0")
    version = ModelVersion("edits", 3, "run", {}, "somewhere")
    systems = edits.systems(version, cast(TabularPredictor, FirstColumn()), splits)
    found = assess(edits.split("edits", splits), systems, [metric("auroc")], baseline="baseline")
    assert found.units == 40
    assert found.systems[0].version == "edits version 3"
    assert found.scores["champion"]["auroc"].score > 0.99
    assert found.scores["baseline"]["auroc"].score == 0.5
    assert found.differences["champion"]["auroc"].interval.low > 0.4
