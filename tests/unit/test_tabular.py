"""Rows from a topic's history, the split by entity, training, and a saved model that predicts the same."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import skops.io
import yaml
from pydantic import ValidationError

from models import predictor
from models.tabular import data, predict, train
from models.tabular.config import DataConfig, TabularConfig
from models.tabular.data import DataError, Examples, Splits

ROOT = Path(__file__).parents[2]
FEATURES = ("count", "mean")
CONFIG = TabularConfig(name="edits", data=DataConfig(feature_service="edits_robot", label="isRobot"))
START = datetime(2015, 9, 12, tzinfo=UTC)


def event(user: str, second: float, robot: object = True) -> bytes:
    moment = (START + timedelta(seconds=second)).isoformat()
    return json.dumps({"user": user, "time": moment, "isRobot": robot, "added": 1}).encode()


def rows_of(values: list[bytes], **settings: int) -> pd.DataFrame:
    config = CONFIG.data.model_copy(update=settings)
    return data.entity_rows(values, "user", "time", config)


def joined(users: int = 300, each: int = 10, seed: int = 0) -> pd.DataFrame:
    """Rows as after the join: robots edit often and evenly, a tenth of all features is missing."""
    draw = np.random.default_rng(seed)
    robot = np.repeat(draw.random(users) < 0.3, each)
    features = np.column_stack([draw.poisson(np.where(robot, 9, 3)), draw.normal(np.where(robot, 1, 0))])
    features = features.astype(np.float64)
    features[draw.random(features.shape) < 0.1] = np.nan
    return pd.DataFrame(
        {
            "user": np.repeat([f"u{user}" for user in range(users)], each),
            "event_timestamp": [START + timedelta(seconds=second) for second in range(users * each)],
            "isRobot": robot,
            "count": features[:, 0],
            "mean": features[:, 1],
        }
    )


@pytest.fixture(scope="module")
def splits() -> Splits:
    return data.split(joined(), "user", FEATURES, CONFIG.data)


@pytest.fixture(scope="module")
def trained(splits: Splits) -> train.Trained:
    return train.train(splits, CONFIG.train)


def test_repeated_events_count_once_and_what_is_no_event_is_left_out() -> None:
    good = [event(f"u{number}", number) for number in range(120)]
    bad = [
        b"not json",
        b"[1]",
        b'"text"',
        b'{"user":"u1"}',
        event("u1", 500, robot="yes"),
        json.dumps({"user": None, "time": START.isoformat(), "isRobot": True}).encode(),
        json.dumps({"user": "u1", "time": "yesterday", "isRobot": True}).encode(),
        json.dumps({"user": "u1", "time": "2999-01-01T00:00:00Z", "isRobot": True}).encode(),
    ]
    rows = rows_of(good + good[:50] + bad)
    assert list(rows.columns) == ["user", "event_timestamp", "isRobot"]
    assert sorted(rows["user"]) == sorted(f"u{number}" for number in range(120))
    assert rows["event_timestamp"].is_monotonic_increasing
    assert str(rows["event_timestamp"].dt.tz) == "UTC"
    assert rows["event_timestamp"][0] == START + timedelta(seconds=CONFIG.data.delay_s)


def test_sampling_bounds_each_entity_and_all_rows_and_ignores_the_order_of_arrival() -> None:
    values = [event("busy", number) for number in range(500)]
    values += [event(f"u{number}", number, robot=False) for number in range(300)]
    rows = rows_of(values, max_rows_per_entity=20, max_rows=250)
    assert len(rows) == 250
    assert rows["user"].value_counts()["busy"] <= 20
    assert rows.equals(rows_of(values[::-1], max_rows_per_entity=20, max_rows=250))
    assert not rows.equals(rows_of(values, max_rows_per_entity=20, max_rows=250, seed=1))


def test_too_few_events_are_refused() -> None:
    with pytest.raises(DataError, match="Only 3 events hold user, time and isRobot"):
        rows_of([event("u", second) for second in range(3)])
    with pytest.raises(DataError, match="Only 0 events"):
        rows_of([])


def test_no_entity_is_in_two_splits_and_the_shares_are_those_asked_for(splits: Splits) -> None:
    entities = [set(getattr(splits, name).entities) for name in data.SPLITS]
    assert sum(len(part) for part in entities) == len(set.union(*entities)) == 300
    assert [len(part) / 300 for part in entities] == pytest.approx([0.6, 0.2, 0.2], abs=0.07)
    assert splits.train.inputs.shape == (len(splits.train.labels), len(FEATURES))


def test_the_hash_is_that_of_the_rows(splits: Splits) -> None:
    assert data.split(joined(), "user", FEATURES, CONFIG.data).hash == splits.hash
    assert data.split(joined(seed=1), "user", FEATURES, CONFIG.data).hash != splits.hash


def test_one_class_only_is_refused() -> None:
    rows = joined().assign(isRobot=False)
    with pytest.raises(DataError, match="split has .* rows, 0 of them with isRobot"):
        data.split(rows, "user", FEATURES, CONFIG.data)


def test_training_beats_the_prior_and_is_repeatable(splits: Splits, trained: train.Trained) -> None:
    metrics = trained.metrics
    assert metrics["auroc"] > 0.85
    assert metrics["auprc"] > metrics["baseline_auprc"] + 0.3
    assert metrics["f1"] > metrics["baseline_f1"] + 0.1
    assert metrics["baseline_auroc"] == 0.5
    assert train.train(splits, CONFIG.train).metrics == metrics


def test_a_feature_that_nobody_has_is_ignored() -> None:
    rows = joined().assign(mean=np.nan)
    trained = train.train(data.split(rows, "user", FEATURES, CONFIG.data), CONFIG.train)
    assert trained.metrics["auroc"] > 0.8
    inputs = np.array([[9.0, np.nan], [9.0, 5.0]])
    assert len(set(trained.classifier.predict_proba(inputs)[:, 1])) == 1


def test_the_threshold_maximises_f1() -> None:
    labels = np.array([False, False, True, False, True, True])
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.8, 0.9])
    threshold = train.best_threshold(labels, scores)
    best = max(train.measure(labels, scores, candidate)["f1"] for candidate in scores)
    assert train.measure(labels, scores, threshold)["f1"] == best


def test_a_saved_model_predicts_the_same(splits: Splits, trained: train.Trained, tmp_path: Path) -> None:
    train.save(tmp_path, trained, splits, CONFIG)
    model = predictor.load(tmp_path)
    assert isinstance(model, predict.TabularPredictor)
    assert (model.task, model.feature_service, model.features) == ("tabular", "edits_robot", FEATURES)
    assert model.threshold == trained.threshold
    columns = dict(zip(FEATURES, splits.test.inputs.T, strict=True))
    probabilities = model.predict(columns | {"unused": np.zeros(1)})
    np.testing.assert_array_equal(probabilities, trained.classifier.predict_proba(splits.test.inputs)[:, 1])
    assert model.predict({name: np.empty(0) for name in FEATURES}).shape == (0,)
    unknown = model.predict({name: np.full(3, np.nan) for name in FEATURES})
    assert unknown.shape == (3,)
    assert ((unknown > 0) & (unknown < 1)).all()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"count": np.zeros(2)}, "needs mean too"),
        ({"count": np.zeros(2), "mean": np.zeros(3)}, "equal length"),
        ({"count": np.zeros((2, 2)), "mean": np.zeros((2, 2))}, "equal length"),
        ({"count": np.array(["a"]), "mean": np.zeros(1)}, "numbers only"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    rows: dict[str, np.ndarray], words: str, splits: Splits, trained: train.Trained
) -> None:
    model = predict.TabularPredictor(
        trained.classifier, feature_service="edits_robot", features=splits.features, threshold=0.5
    )
    with pytest.raises(predict.TabularError, match=words):
        model.predict(rows)


class Intruder:
    """A type that no model may contain."""


def test_a_damaged_or_foreign_file_is_refused(splits: Splits, trained: train.Trained, tmp_path: Path) -> None:
    train.save(tmp_path, trained, splits, CONFIG)
    skops.io.dump(Intruder(), tmp_path / train.MODEL_FILE)
    with pytest.raises(predict.TabularError, match="Untrusted"):
        predict.load(tmp_path)
    (tmp_path / train.MODEL_FILE).write_bytes(b"PK\x03\x04")
    with pytest.raises(predict.TabularError, match="is not a tabular model"):
        predict.load(tmp_path)
    with pytest.raises(predict.TabularError):
        predict.load(tmp_path / "nowhere")


def test_the_configuration_is_checked() -> None:
    TabularConfig.model_validate(yaml.safe_load((ROOT / "configs/tabular/edits.yaml").read_text()))
    with pytest.raises(ValidationError, match="nothing to train on"):
        DataConfig(feature_service="a", label="b", test_share=0.6, validation_share=0.5)
    with pytest.raises(ValidationError, match="extra"):
        TabularConfig.model_validate({"name": "a", "data": {"feature_service": "a", "label": "b", "rows": 3}})


def test_examples_keep_missing_values(splits: Splits) -> None:
    parts: list[Examples] = [getattr(splits, name) for name in data.SPLITS]
    missing = np.concatenate([np.isnan(part.inputs) for part in parts]).mean()
    assert missing == pytest.approx(0.1, abs=0.02)
