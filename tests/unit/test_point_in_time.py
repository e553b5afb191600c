"""Training rows through Feast's duckdb store equal pandas.merge_asof, with many parts, revisions, half a compaction."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.data_format import ParquetFormat
from feast.types import Float64, Int64, String

from streaming.offline import OfflineLog
from streaming.records import Emission

START = datetime(2026, 3, 1, tzinfo=UTC)
START_US = int(START.timestamp()) * 1_000_000
PARTS = 30
USERS = [f"user{number}" for number in range(12)]


def opened(folder, features) -> FeatureStore:
    config = RepoConfig(
        project="test",
        provider="local",
        registry=str(folder / "registry.db"),
        offline_store={"type": "duckdb"},
        online_store=None,
        entity_key_serialization_version=3,
    )
    store = FeatureStore(config=config)
    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    source = FileSource(
        path=f"{folder}/parts/*.parquet",
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column="created_timestamp",
    )
    schema = [Field(name="user", dtype=String), *(Field(name=name, dtype=dtype) for name, dtype in features.items())]
    store.apply(
        [user, FeatureView(name="activity", entities=[user], schema=schema, source=source, ttl=timedelta(days=9))]
    )
    return store


def write_history(log: OfflineLog, seed: int) -> pd.DataFrame:
    """Window ends of every 10 s, revised now and then by a later part; the rows as one frame."""
    random = np.random.default_rng(seed)
    frames = []
    for part in range(PARTS):
        rows = []
        for emission in range(3):
            ends = (part + random.integers(-3, 1)) * 10_000_000
            users = sorted(random.choice(USERS, random.integers(1, len(USERS)), replace=False))
            created_us = START_US + part * 1_000_000 + emission
            edits = pa.array(random.integers(0, 1_000, len(users)))
            mean = pa.array([None if value < 0.2 else value for value in random.random(len(users))], pa.float64())
            times = np.full(len(users), START_US + ends)
            rows.append((Emission(pa.array(users), times, pa.table({"edits": edits, "mean": mean})), created_us))
            frames.append(
                pd.DataFrame({"user": users, "edits": edits, "mean": mean, "at_us": times, "created_us": created_us})
            )
        log.write(part % 2, 100 * part, 100 * part + 100, part, rows)
    return pd.concat(frames)


def questions(seed: int) -> pd.DataFrame:
    random = np.random.default_rng(seed + 1)
    seconds = random.choice(np.arange(-400, 3_500), 150, replace=False) / 10
    frame = pd.DataFrame({"user": random.choice([*USERS, "nobody"], 150), "seconds": np.sort(seconds)})
    frame["event_timestamp"] = [START + timedelta(seconds=float(second)) for second in frame.seconds]
    return frame.drop(columns="seconds")


def oracle(asked: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    newest = history.sort_values("created_us").drop_duplicates(["user", "at_us"], keep="last")
    newest["event_timestamp"] = pd.to_datetime(newest.at_us, unit="us", utc=True).astype("datetime64[us, UTC]")
    asked = asked.assign(event_timestamp=asked.event_timestamp.astype("datetime64[us, UTC]"))
    newest = newest.sort_values("event_timestamp")[["user", "event_timestamp", "edits", "mean"]]
    return pd.merge_asof(asked, newest, on="event_timestamp", by="user").sort_values(["event_timestamp"])


def asked_of_feast(store: FeatureStore, asked: pd.DataFrame, names) -> pd.DataFrame:
    job = store.get_historical_features(entity_df=asked, features=[f"activity:{name}" for name in names])
    return job.to_df().sort_values(["event_timestamp"])


@pytest.mark.parametrize("seed", [1, 2])
def test_training_rows_are_those_of_merge_asof_before_while_and_after_compaction(tmp_path, seed):
    log = OfflineLog(str(tmp_path / "parts"), "edits", "user")
    history, asked = write_history(log, seed), questions(seed)
    store, expected = opened(tmp_path, {"edits": Int64, "mean": Float64}), oracle(asked, history)
    assert expected.edits.notna().sum() > 50
    steps = [
        lambda: None,
        lambda: log.compact(0, 2_000, 19),  # merged parts and what they replace lie side by side
        lambda: next((tmp_path / "parts").glob("edits-00000-0-100.parquet")).unlink(),  # and some were removed
        lambda: [log.compact(partition, 3_000, 29) for partition in (0, 1)],
        lambda: [log.compact(partition, 3_000, 29) for partition in (0, 1)],
    ]
    counts = []
    for step in steps:
        step()
        counts.append(len(list((tmp_path / "parts").iterdir())))
        found = asked_of_feast(store, asked, ["edits", "mean"])
        for name in ("edits", "mean"):
            np.testing.assert_array_equal(found[name].to_numpy(float), expected[name].to_numpy(float))
    assert counts == [30, 31, 30, 22, 7]


def test_a_feature_that_was_added_later_is_null_in_older_rows(tmp_path):
    log = OfflineLog(str(tmp_path / "parts"), "edits", "user")
    write_history(log, 3)
    opened(tmp_path, {"edits": Int64, "mean": Float64})
    log = OfflineLog(str(tmp_path / "parts"), "edits", "user")
    for partition in (0, 1):
        features = pa.table({"edits": [1], "mean": [0.5], "top": pa.array([9.5])})
        later = Emission(pa.array([f"new{partition}"]), np.array([START_US + 10**9]), features)
        log.write(partition, 3_000, 3_100, 31, [(later, START_US)])
    store = opened(tmp_path, {"edits": Int64, "mean": Float64, "top": Float64})
    asked = pd.DataFrame({"user": ["user1", "new0", "new1"], "event_timestamp": [START + timedelta(seconds=1_001)] * 3})
    found = asked_of_feast(store, asked, ["edits", "top"]).set_index("user")
    assert found.top.fillna(-1).to_dict() == {"user1": -1, "new0": 9.5, "new1": 9.5}
    assert found.edits.notna().all()
