"""The skew job over a real topic of predictions: no mismatch for what was served, and a lie is found."""

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from feast import FeatureStore
from kafka import KafkaProducer

from streaming.checkpoint import CheckpointStore
from streaming.consumer import Consumer
from streaming.offline import OfflineLog
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
def check(kafka: str, repo: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """The job, run in this process: importing Feast again for every run would take most of the time."""
    specification = importlib.util.spec_from_file_location("check_skew", ROOT / "ray_jobs" / "check_skew.py")
    assert specification is not None and specification.loader is not None
    job = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(job)
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", kafka)

    def run(*options: str) -> dict:
        arguments = ["check_skew.py", "--repo", str(repo), "--view", "editor_activity", *options]
        monkeypatch.setattr(sys, "argv", arguments)
        return job.main()["views"]["editor_activity"]

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
    assert check() == right
    assert check("--recompute") == right

    event["features"]["sum_added_1h"] += 1.0
    producer.send("predictions", value=json.dumps(event).encode())
    producer.flush()
    producer.close()
    wrong = right | {"predictions": sent + 1, "matched": 18 * sent + 17, "mismatches": 1}
    assert check() == wrong
    assert check("--recompute") == wrong
