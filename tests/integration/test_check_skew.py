"""The skew job over a real topic of predictions: no mismatch for what was served, and what is wrong is an error."""

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from feast import Aggregation, Entity, FeatureStore, Field, FileSource, KafkaSource, StreamFeatureView, ValueType
from feast.data_format import JsonFormat, ParquetFormat
from feast.types import Int64, String
from kafka import KafkaProducer

from ops.jobs import JobError
from streaming.checkpoint import CheckpointStore
from streaming.consumer import Consumer
from streaming.offline import OfflineLog
from streaming.opening import open_offline_log
from streaming.records import Emission
from streaming.topics import ensure_topics
from streaming.views import plans
from streaming.worker import Worker

ROOT = Path(__file__).parents[2]
START = np.datetime64("2024-05-01T00:00:00")


class Online:
    """Keeps every emission, as a server might have read any of them."""

    def __init__(self) -> None:
        self.emissions: list[Emission] = []

    def write(self, emissions: list) -> int:
        self.emissions += emissions
        return len(emissions)

    def sync(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def check(kafka: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """The job of a repository and a view, in this process: importing Feast for each run would take most of the time."""
    specification = importlib.util.spec_from_file_location("check_skew", ROOT / "ray_jobs" / "check_skew.py")
    assert specification is not None and specification.loader is not None
    job = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(job)
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", kafka)

    def run(repo: Path, view: str, *options: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["check_skew.py", "--repo", str(repo), "--view", view, *options])
        return job.main()["views"][view]

    return run


def test_what_was_served_is_what_is_logged_and_what_is_computed_again(kafka, repo, home, check):
    ensure_topics(kafka, {"edits": 1, "predictions": 1})
    producer = KafkaProducer(bootstrap_servers=kafka, linger_ms=5)
    random = np.random.default_rng(5)
    for second in np.sort(random.uniform(0, 4_000, 600)):
        moment = f"{START + np.timedelta64(int(second * 1e6), 'us')}Z"
        event = {"user": f"user {random.integers(9)}", "time": moment, "added": int(random.integers(99)), "deleted": 1}
        producer.send("edits", key=event["user"].encode(), value=json.dumps(event).encode())
    producer.flush()
    (plan,) = plans(FeatureStore(repo_path=str(repo)), ["editor_activity"])
    online = Online()
    worker = Worker(
        plan,
        source=Consumer(kafka, "edits", "skew"),
        online=online,
        offline=OfflineLog(str(home / "features" / "offline" / "editor_activity"), "edits", "user"),
        rejects=Online(),
        checkpoints=CheckpointStore(str(home / "checkpoints")),
        ticking=False,
    )
    worker.start({0: 1})
    deadline_s = time.monotonic() + 120
    while worker.step(1.0) or not worker.caught_up():
        assert time.monotonic() < deadline_s
    worker.checkpoint()
    worker.close()

    sent = 0
    for number, emission in enumerate(online.emissions[::3]):
        row = emission.features.slice(0, 1).to_pylist()[0]
        at = datetime.fromtimestamp(int(emission.event_time_us[0]) // 1_000_000, UTC).isoformat()
        features = {name: value if value is None else float(value) for name, value in row.items()}
        event = {"id": str(number), "entity": emission.entities[0].as_py(), "features": features}
        event["features_at"] = dict.fromkeys(features, at)
        producer.send("predictions", key=event["id"].encode(), value=json.dumps(event).encode())
        sent += 1
    producer.send("predictions", value=b"no json")
    missing = {"id": "x", "entity": "nobody", "features": {"sum_added_1h": None}, "features_at": {"sum_added_1h": None}}
    producer.send("predictions", value=json.dumps(missing).encode())
    producer.flush()
    right = {"predictions": sent, "matched": 18 * sent, "mismatches": 0, "defaulted": 1, "unknown": 0, "unreadable": 1}
    assert check(repo, "editor_activity") == right
    assert check(repo, "editor_activity", "--recompute") == right

    event["features"]["sum_added_1h"] += 1.0
    producer.send("predictions", value=json.dumps(event).encode())
    producer.flush()
    producer.close()
    wrong = right | {"predictions": sent + 1, "matched": 18 * sent + 17, "mismatches": 1}
    for options, known in (
        ([], f"the offline log {home}/features/offline/editor_activity"),
        (["--recompute"], "the topic"),
    ):
        with pytest.raises(
            JobError, match=f"In view 'editor_activity': 1 of {18 * (sent + 1)} served .* {known}"
        ) as lie:
            check(repo, "editor_activity", *options)
        assert lie.value.result["views"]["editor_activity"] == wrong


def declared(folder: Path, kafka: str, name: str, log: str) -> FeatureStore:
    """A repository of one view, whose feature is the name's own."""
    folder.mkdir()
    (folder / "feature_store.yaml").write_text(
        "project: skew\nprovider: local\nregistry: registry.db\nonline_store:\n  path: online.db\n"
        "offline_store:\n  type: duckdb\nentity_key_serialization_version: 3\n"
    )
    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    source = KafkaSource(
        name="edits",
        topic="edits",
        kafka_bootstrap_servers=kafka,
        message_format=JsonFormat(schema_json="time timestamp, user string, added bigint"),
        timestamp_field="time",
        watermark_delay_threshold=timedelta(minutes=5),
        batch_source=FileSource(name="log", path=log, file_format=ParquetFormat(), timestamp_field="event_timestamp"),
    )
    view = StreamFeatureView(
        name=name,
        entities=[user],
        source=source,
        timestamp_field="time",
        aggregations=[
            Aggregation(name=f"edits_{name}", column="added", function="count", time_window=timedelta(hours=1))
        ],
        schema=[Field(name="user", dtype=String), Field(name=f"edits_{name}", dtype=Int64)],
    )
    FeatureStore(repo_path=str(folder)).apply([user, source, view])
    return FeatureStore(repo_path=str(folder))


@pytest.mark.parametrize(
    ("name", "declared_log", "real_folder"),
    [
        ("relative", "data/edits/*.parquet", "relative/data/edits"),
        ("elsewhere", "data/edits.parquet", "home/features/offline/elsewhere"),
    ],
)
def test_the_log_is_looked_for_where_the_worker_writes_it(kafka, home, check, name, declared_log, real_folder):
    store = declared(home.parent / name, kafka, name, declared_log)
    folder = home.parent / real_folder
    (plan,) = plans(store, [name])
    feature = f"edits_{name}"
    ensure_topics(kafka, {"edits": 1, "predictions": 1})
    producer = KafkaProducer(bootstrap_servers=kafka)

    with pytest.raises(JobError, match=f"Nothing was checked: no prediction .* read features of {name}"):
        check(store.repo_path, name)
    at = "2024-05-01T00:00:01+00:00"
    event = {"id": "1", "entity": "ada", "features": {feature: 3.0}, "features_at": {feature: at}}
    producer.send("predictions", value=json.dumps(event).encode())
    producer.flush()
    with pytest.raises(
        JobError, match=f"'{name}': none of the 1 predictions could be .* log {folder} has none"
    ) as blind:
        check(store.repo_path, name)
    assert blind.value.result["views"][name]["unknown"] == 1

    log = open_offline_log(store, plan, home)
    time_us = np.array([1_714_521_601_000_000])
    log.write(0, 0, 1, int(time_us[0]), [(Emission(pa.array(["ada"]), time_us, pa.table({feature: [3]})), 0)])
    assert [path.parent for path in home.parent.rglob("*.parquet")] == [folder]
    found = check(store.repo_path, name)
    assert (found["predictions"], found["matched"], found["mismatches"], found["unknown"]) == (1, 1, 0, 0)

    event["features"][feature] = 4.0
    producer.send("predictions", value=json.dumps(event).encode())
    producer.close()
    with pytest.raises(JobError, match=f"'{name}': 1 of 2 served values differ from the offline log {folder}"):
        check(store.repo_path, name)
