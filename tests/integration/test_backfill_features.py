"""The backfill job over files and a topic: the rows and the last values of a live worker over the same events."""

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from kafka import KafkaProducer

from streaming import backfill, history
from streaming.checkpoint import CheckpointStore
from streaming.consumer import Consumer
from streaming.offline import OfflineLog
from streaming.plan import Aggregate, Column, Plan
from streaming.topics import ensure_topics
from streaming.worker import Worker

ROOT = Path(__file__).parents[2]
MINUTE = 60_000_000
START = np.datetime64("2024-05-01T00:00:00")


def plan(servers: str, topic: str) -> Plan:
    aggregates = tuple(
        Aggregate(f"{function}_{window}m", "added", function, window * MINUTE, slide * MINUTE)  # type: ignore[arg-type]
        for window, slide in ((10, 1), (60, 60))
        for function in ("count", "sum", "mean")
    )
    column = Column("added", "double", nullable=True)
    return Plan("activity", topic, servers, "user", "string", "time", (column,), aggregates, 5 * MINUTE)


def produce(servers: str, topic: str, partitions: int, count: int) -> None:
    """Two hours of events keyed by user, some out of order, some late, two poisoned."""
    random = np.random.default_rng(11)
    producer = KafkaProducer(bootstrap_servers=servers, linger_ms=10)
    for row, second in enumerate(np.sort(random.uniform(0, 7_200, count))):
        second -= random.choice([0, 0, 0, 100, 1_500])
        user = f"user {random.zipf(1.4) % 40}"
        event = {"time": f"{START + np.timedelta64(int(second * 1e6), 'us')}Z", "user": user, "added": random.normal()}
        value = json.dumps(event).encode() if row % 1_000 != 999 else b'{"broken"'
        producer.send(topic, key=user.encode(), value=value, partition=hash(user) % partitions)
    producer.flush()
    producer.close()


class Kept:
    """An online sink and a reject log that keep what they get."""

    def __init__(self) -> None:
        self.rows: list = []

    def write(self, rows: list) -> int:
        self.rows += rows
        return len(rows)

    def sync(self) -> None: ...

    def close(self) -> None: ...


def live(what: Plan, partitions: int, folder: Path) -> tuple[dict, Kept]:
    """What a worker logs offline: (user, time) to the bits of the features."""
    rejects = Kept()
    worker = Worker(
        what,
        source=Consumer(what.bootstrap_servers, what.topic, "live"),
        online=Kept(),
        offline=OfflineLog(str(folder / "log"), what.topic, what.entity),
        rejects=rejects,
        checkpoints=CheckpointStore(str(folder / "checkpoints")),
        ticking=False,
    )
    worker.start(dict.fromkeys(range(partitions), 1))
    deadline_s = time.monotonic() + 120
    while worker.step(1.0) or not worker.caught_up():
        assert time.monotonic() < deadline_s
    worker.checkpoint()
    worker.close()
    return rows(folder / "log"), rejects


def rows(folder: Path) -> dict:
    whole = pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet")))
    found = {
        (row["user"], row["event_timestamp"]): tuple(
            value.hex() if isinstance(value, float) else value for name, value in row.items() if name[-1] == "m"
        )
        for row in whole.to_pylist()
    }
    assert len(found) == whole.num_rows
    return found


def newest(found: dict) -> dict:
    return {user: values for (user, _), values in sorted(found.items(), key=lambda item: item[0][1])}


def run(what: Plan, source: str, folder: Path, shards: int) -> tuple[backfill.Backfilled, dict]:
    output = backfill.Output(str(folder), "event_timestamp", "created_timestamp", time.time_ns() // 1_000)
    backfill.prepare(output)
    done, _ = backfill.run_on_ray(what, history.pieces(what, source), output, shards)
    return done, rows(folder)


def test_a_topic_gives_what_the_live_worker_gave(kafka, ray_local, tmp_path):
    topic, partitions = "backfilled", 2
    ensure_topics(kafka, {topic: partitions})
    produce(kafka, topic, partitions, 4_000)
    what = plan(kafka, topic)
    logged, rejects = live(what, partitions, tmp_path)
    one, alone = run(what, f"kafka:{topic}", tmp_path / "one", 1)
    four, shared = run(what, f"kafka:{topic}", tmp_path / "four", 4)
    assert (one, alone) == (four, shared)
    both = alone.keys() & logged.keys()
    assert len(both) > 1_000
    assert {key: alone[key] for key in both} == {key: logged[key] for key in both}
    assert newest(alone) == newest(logged)
    assert (one.events, one.dead, one.late) == (4_000, 4, sum(reject.kind == "late" for reject in rejects.rows))
    assert one.late > 100
    lines = (tmp_path / "one" / "rejects.jsonl").read_text().splitlines()
    written = sorted((each["partition"], each["offset"], each["reason"]) for each in map(json.loads, lines))
    assert written == sorted((each.partition, each.offset, each.reason) for each in rejects.rows)


def test_the_job_says_what_it_did_and_what_it_cannot(repo, home, tmp_path):
    events = [
        {"time": f"{START + np.timedelta64(second, 's')}Z", "user": f"user {second % 7}", "added": second, "deleted": 1}
        for second in range(0, 7_200, 5)
    ]
    source = tmp_path / "edits.jsonl.gz"
    source.write_bytes(gzip.compress("".join(json.dumps(event) + "\n" for event in events).encode() + b"{\n"))
    command = [sys.executable, "ray_jobs/backfill_features.py", "--repo", repo, "--view", "editor_activity"]
    command += ["--input", source, "--output", tmp_path / "out"]
    done = subprocess.run([*command, "--workers", "2"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["events"], result["rejects"], result["keys"]) == (1_441, {"dead": 1, "late": 0}, 7)
    assert result["rows"] == sum(pq.read_metadata(path).num_rows for path in (tmp_path / "out").glob("*.parquet"))
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].startswith("error: ") and "give --output an empty folder" in again.stderr
