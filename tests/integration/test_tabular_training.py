"""Our feature repository applied by Feast, point-in-time joins from its log, and the training job on top."""

import runpy
import sys
from pathlib import Path

import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import FeatureStore

from models import predictor
from models.registry import Registry
from models.tabular import data
from models.tabular.config import DataConfig
from streaming.producing import columns
from streaming.simulators import editors
from streaming.simulators.arrival import Faults, disturb
from streaming.simulators.produce import ensure_topic, produce

ROOT = Path(__file__).parents[2]
CONFIG = DataConfig(feature_service="edits_robot", label="isRobot")
TOPIC = "edits-to-train-on"


def activity(events: pd.DataFrame, names: tuple[str, ...]) -> pd.DataFrame:
    """One row an edit for the view's log: running count and means stand for the windows, the rest is missing."""
    by_user = events.groupby("user")
    known = {
        "count_added_1h": by_user.cumcount() + 1.0,
        "mean_added_1h": by_user["added"].expanding().mean().droplevel(0),
        "mean_deleted_1h": by_user["deleted"].expanding().mean().droplevel(0),
    }
    log = events[["user", "event_timestamp"]].assign(**{name: np.nan for name in names}).assign(**known)
    return log.assign(created_timestamp=pd.Timestamp.now(tz="UTC"))


def write_log(home: Path, log: pd.DataFrame, parts: int) -> None:
    folder = home / "features" / "offline" / "editor_activity"
    folder.mkdir(parents=True)
    types = {name: pa.float64() for name in log.columns} | {"user": pa.string()}
    types |= {name: pa.int64() for name in log.columns if name.startswith("count_")}
    types |= {name: pa.timestamp("us", "UTC") for name in ("event_timestamp", "created_timestamp")}
    table = pa.Table.from_pandas(log, schema=pa.schema(types), preserve_index=False)
    size = -(-len(log) // parts)
    for number in range(parts):
        pq.write_table(table.slice(number * size, size), folder / f"edits-00000-{number * size}.parquet")


def frame(count: int) -> pd.DataFrame:
    rows = pd.DataFrame([orjson.loads(event.value) for event in columns.rows(editors.edits(count, editors=600))])
    return rows.assign(event_timestamp=pd.to_datetime(rows["time"], utc=True))


def test_joined_features_are_those_known_then_and_the_job_registers_a_champion(
    repo: Path, home: Path, kafka: str, mlflow_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One test, because applying the repository takes longer than all the rest.
    store = FeatureStore(repo_path=str(repo))
    view = store.get_stream_feature_view("editor_activity")
    view.stream_source.kafka_options.topic = TOPIC  # other tests share the broker's `edits`
    store.apply([view])
    check_stream(store)
    events = frame(4000)
    check_join(store, events, home)
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", kafka)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    check_job(repo, kafka, mlflow_uri, tmp_path, monkeypatch)


def check_stream(store: FeatureStore) -> None:
    source = data.stream(store, CONFIG.feature_service)
    assert (source.topic, source.entity, source.timestamp) == (TOPIC, "user", "time")
    assert len(source.features) == 15
    with pytest.raises(data.DataError, match="Feature service nobody is not applied; applied are: edits_robot"):
        data.stream(store, "nobody")
    with pytest.raises(data.DataError, match="reads utterance_audio: it must read one stream feature view"):
        data.stream(store, "speech_slices")


def check_join(store: FeatureStore, events: pd.DataFrame, home: Path) -> None:
    """Against pandas, over a log of many parts that begins late, at times between two edits."""
    source = data.stream(store, CONFIG.feature_service)
    rows = events[["user", "event_timestamp", "isRobot"]].iloc[::3].reset_index(drop=True)
    rows["event_timestamp"] = rows["event_timestamp"].dt.floor("s") + pd.Timedelta(seconds=17)
    rows = rows.drop_duplicates(["user", "event_timestamp"])
    with pytest.raises(data.DataError, match="No features are logged"):
        data.with_features(store, rows, CONFIG, source)

    log = activity(events, source.features).iloc[500:]
    write_log(home, log, parts=30)
    joined = data.with_features(store, rows, CONFIG, source)
    expected = pd.merge_asof(
        rows.sort_values("event_timestamp"), log, on="event_timestamp", by="user", direction="backward"
    ).sort_values(["event_timestamp", "user"], ignore_index=True)
    assert list(joined["user"]) == list(expected["user"])
    assert 0 < joined["count_added_1h"].isna().sum() < len(joined)
    for name in source.features:
        np.testing.assert_array_equal(joined[name], expected[name].astype(np.float64))

    ancient = rows.assign(event_timestamp=rows["event_timestamp"] - pd.Timedelta(days=30))
    with pytest.raises(data.DataError, match="None of the .* events has features"):
        data.with_features(store, ancient, CONFIG, source)


def check_job(repo: Path, kafka: str, mlflow_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = runpy.run_path(str(ROOT / "ray_jobs" / "train_edits.py"))
    arguments = ["train_edits.py", "--config", str(ROOT / "configs/tabular/edits.yaml"), "--repo", str(repo)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--set", "train.max_iter=30"])
    ensure_topic(kafka, TOPIC, 2)
    with pytest.raises(data.DataError, match=f"Topic {TOPIC} holds no events"):
        job["main"]()

    produce(disturb(editors.edits(4000, editors=600), Faults(duplicates=0.1, poison=0.1)), kafka, TOPIC)
    result = job["main"]()
    assert result["model"] == "edits"
    assert sum(result["rows"].values()) > 1000
    assert result["auroc"] > 0.7 > result["baseline_auroc"]

    registry = Registry(mlflow_uri)
    version = registry.resolve("edits", "champion")
    assert version.version == result["version"]
    model = predictor.load(registry.download(version, tmp_path / "cache"))
    probability = model.predict({name: np.full(2, np.nan) for name in model.features})
    assert probability.shape == (2,)
