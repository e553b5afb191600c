"""Kafka to Feast, for real: values equal a brute-force pandas computation, also after SIGKILL; nothing is lost."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import psutil
import pytest
from feast import Entity, FeatureStore, Field, FileSource, KafkaSource, ValueType
from feast.aggregation import Aggregation
from feast.data_format import JsonFormat, ParquetFormat
from feast.stream_feature_view import StreamFeatureView
from feast.types import Float64, Int64, String
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition

from streaming import topics
from streaming.deriving.topology import SupervisorError
from streaming.rejects import identity
from streaming.report import read_views, scale
from streaming.supervisor import Supervisor
from streaming.topics import ensure_topics
from streaming.views import plans
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
START = pd.Timestamp("2024-05-01T00:00:00Z")
MINUTE = pd.Timedelta(minutes=1)
WINDOWS = {"10m": (10 * MINUTE, MINUTE), "1h": (60 * MINUTE, 60 * MINUTE)}


def foreign_repo(folder: Path, topic: str, servers: str, online: str, integer_key: bool) -> FeatureStore:
    """A Feast repository as somebody else would have it: its own registry, store and topic."""
    folder.mkdir(parents=True)
    (folder / "feature_store.yaml").write_text(
        f"project: foreign\nprovider: local\nregistry: data/registry.db\n"
        f"online_store:\n  type: {online}\n  path: data/online.db\n"
        "offline_store:\n  type: duckdb\nentity_key_serialization_version: 3\n"
    )
    (folder / "data").mkdir()
    value_type, dtype, sql = (ValueType.INT64, Int64, "bigint") if integer_key else (ValueType.STRING, String, "string")
    user = Entity(name="person", join_keys=["user"], value_type=value_type)
    source = KafkaSource(
        name="actions",
        topic=topic,
        kafka_bootstrap_servers=servers,
        message_format=JsonFormat(schema_json=f"time timestamp, user {sql}, added bigint"),
        timestamp_field="time",
        watermark_delay_threshold=timedelta(minutes=5),
        batch_source=FileSource(
            path=f"{folder}/data/log/*.parquet",
            file_format=ParquetFormat(),
            timestamp_field="event_timestamp",
            created_timestamp_column="created_timestamp",
        ),
    )
    functions = {"count": Int64, "sum": Float64, "mean": Float64}
    view = StreamFeatureView(
        name="activity",
        entities=[user],
        source=source,
        timestamp_field="time",
        aggregations=[
            Aggregation(
                name=f"{function}_{name}", column="added", function=function, time_window=window, slide_interval=slide
            )
            for name, (window, slide) in WINDOWS.items()
            for function in functions
        ],
        schema=[
            Field(name="user", dtype=dtype),
            *(Field(name=f"{function}_{name}", dtype=kind) for name in WINDOWS for function, kind in functions.items()),
        ],
    )
    store = FeatureStore(repo_path=str(folder))
    store.apply([user, view])
    return store


def edits(count: int, users: int, integer_key: bool, partitions: int) -> pd.DataFrame:
    """Edits of three hours, a little out of order, in the order in which they are produced."""
    random = np.random.default_rng(7)
    minutes = np.linspace(0, 179, count) + random.uniform(0, 2, count)
    names = random.zipf(1.5, count) % users
    frame = pd.DataFrame(
        {
            "time": START + pd.to_timedelta(minutes, unit="min").floor("ms"),
            "user": names if integer_key else [f"user {name}" for name in names],
            "added": [None if value < 20 else int(value) for value in random.integers(0, 1000, count)],
        }
    )
    frame["partition"] = [zlib.crc32(str(user).encode()) % partitions for user in frame["user"]]
    # The clock ends one second after a full minute, so the seconds that a live worker idles cross no pane.
    for partition in range(partitions):
        last = frame.index[frame["partition"] == partition][-1]
        frame.loc[last, "time"] = START + 181 * MINUTE + pd.Timedelta(seconds=1)
    return frame


def brute_force(frame: pd.DataFrame) -> dict:
    """User to the values of the windows that hold at the clock of their partition."""
    found = {}
    for _, partition in frame.groupby("partition"):
        clock = partition["time"].max()
        for user, rows in partition.groupby("user"):
            values: dict[str, float | None] = {}
            for name, (window, slide) in WINDOWS.items():
                end = clock.floor(slide) + slide
                added = rows.loc[(rows["time"] >= end - window) & (rows["time"] < end), "added"].dropna().astype(float)
                values |= {f"count_{name}": len(added), f"sum_{name}": float(added.sum())}
                values[f"mean_{name}"] = float(added.mean()) if len(added) else None
            found[user] = values
    return found


def produce(servers: str, topic: str, frame: pd.DataFrame) -> None:
    producer = KafkaProducer(bootstrap_servers=servers, linger_ms=10)
    for row in frame.itertuples():
        added = None if pd.isna(row.added) else int(row.added)
        event = {"time": row.time.isoformat(), "user": row.user, "added": added}
        producer.send(topic, key=str(row.user).encode(), value=json.dumps(event).encode(), partition=row.partition)
    producer.flush()
    producer.close()


def online(store: FeatureStore, users: list) -> dict:
    names = [f"{function}_{name}" for name in WINDOWS for function in ("count", "sum", "mean")]
    read = store.get_online_features(
        features=[f"activity:{name}" for name in names], entity_rows=[{"user": user} for user in users]
    ).to_dict()
    return {user: {name: read[name][row] for name in names} for row, user in enumerate(read["user"])}


def newest_offline(folder: Path) -> dict:
    rows = duckdb.sql(
        f"SELECT DISTINCT ON (user) * FROM '{folder}/data/log/*.parquet'"
        " ORDER BY user, event_timestamp DESC, created_timestamp DESC"
    ).to_arrow_table()
    return {
        row["user"]: {name: value for name, value in row.items() if name[-3:] == "10m" or name[-2:] == "1h"}
        for row in rows.to_pylist()
    }


def rows(folder: Path) -> list[dict]:
    """What the job whose home is in this folder says of each partition."""
    return list(read_views(folder / "home" / "stream").get("activity", {}).values())


def read(servers: str, topic: str, count: int) -> list:
    consumer = KafkaConsumer(bootstrap_servers=servers, auto_offset_reset="earliest")
    consumer.assign([TopicPartition(topic, 0)])
    found: list = []
    wait_for(lambda: found.extend(*consumer.poll(timeout_ms=200).values()) or len(found) >= count, topic)
    consumer.close()
    return found


def test_values_after_sigkill_of_the_worker_equal_brute_force(kafka, ray_local, tmp_path):
    repo, topic = tmp_path / "repo", "killed-edits"
    store = foreign_repo(repo, topic, kafka, "streaming.sinks.GuardedSqliteOnlineStore", integer_key=False)
    ensure_topics(kafka, {topic: 2})
    frame = edits(5_000, 300, integer_key=False, partitions=2)
    supervisor = Supervisor(store, plans(store, None), home=tmp_path / "home", workers=1)
    result: dict = {}
    thread = threading.Thread(target=lambda: result.update(supervisor.run()))

    def processed() -> int:
        return sum(row["processed"] for row in rows(tmp_path))

    thread.start()
    try:
        produce(kafka, topic, frame[:2_500])
        wait_for(lambda: processed() == 2_500, "the first half")
        pid = rows(tmp_path)[0]["pid"]
        os.kill(pid, signal.SIGKILL)
        produce(kafka, topic, frame[2_500:])
        wait_for(lambda: processed() == 5_000, "the second half")
        assert {row["pid"] for row in rows(tmp_path)} != {pid}
        assert {row["epoch"] for row in rows(tmp_path)} == {2}
    finally:
        supervisor.stop()
        thread.join(timeout=60)
    assert not thread.is_alive()
    assert (result["activity"]["processed"], result["activity"]["dead"], result["activity"]["late"]) == (5_000, 0, 0)
    expected = brute_force(frame)
    assert online(store, sorted(expected)) == expected
    assert newest_offline(repo) == expected
    assert all(row["lag"] == 0 for row in rows(tmp_path))


POISON = [
    b"{not json",
    b"[1, 2]",
    b'{"user": 5, "added": 1}',
    b'{"time": "2024-05-01T03:00:00Z", "added": 1}',
    b'{"time": "2024-05-01T03:00:00Z", "user": "five", "added": 1}',
    b'{"time": "2024-05-01T03:00:00Z", "user": 5, "added": "one"}',
    b'{"time": "2999-01-01T00:00:00Z", "user": 5, "added": 1}',
]


def test_the_job_runs_somebody_elses_repository_until_caught_up(kafka, tmp_path):
    repo, topic = tmp_path / "repo", "foreign-actions"
    store = foreign_repo(repo, topic, kafka, "sqlite", integer_key=True)
    environ = os.environ | {"MILLRACE_HOME": str(tmp_path / "home"), "RAY_AUTH_TOKEN": "", "OMP_NUM_THREADS": "1"}

    def job() -> dict:
        command = [sys.executable, "ray_jobs/stream_features.py", "--repo", str(repo), "--until-caught-up"]
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])["views"]["activity"]

    ensure_topics(kafka, {topic: 1})
    frame = edits(1_000, 50, integer_key=True, partitions=1)
    produce(kafka, topic, frame)
    producer = KafkaProducer(bootstrap_servers=kafka)
    late = [b'{"time": "2024-04-30T12:00:00Z", "user": 5, "added": 1}'] * 3
    for value in POISON + late:
        producer.send(topic, value)
    producer.flush()
    producer.close()

    result = job()
    assert (result["processed"], result["dead"], result["late"]) == (1_000, len(POISON), len(late))
    assert result["events_per_s"] > 0
    expected = brute_force(frame)
    assert result["keys"] == len(expected)
    assert online(store, sorted(expected)) == expected
    assert newest_offline(repo) == expected
    for kind, count in (("dead", len(POISON)), ("late", len(late))):
        found = read(kafka, f"{topic}.{kind}", count)
        assert len({identity(record.headers) for record in found}) == count
        assert all(dict(record.headers)["reason"] for record in found)
    (row,) = rows(tmp_path)
    assert row["processed"] == 1_000


def test_a_job_whose_ray_dies_ends_and_the_next_one_goes_on(kafka, tmp_path):
    repo, topic = tmp_path / "repo", "without-ray"
    store = foreign_repo(repo, topic, kafka, "sqlite", integer_key=False)
    environ = os.environ | {"MILLRACE_HOME": str(tmp_path / "home"), "RAY_AUTH_TOKEN": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "ray_jobs/stream_features.py", "--repo", str(repo)]

    ensure_topics(kafka, {topic: 1})
    frame = edits(1_000, 50, integer_key=False, partitions=1)
    produce(kafka, topic, frame[:600])
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: [row["processed"] for row in rows(tmp_path)] == [600], "the first events")
        next(one for one in psutil.Process(job.pid).children() if one.name() == "raylet").kill()
        assert job.wait(120) == 2
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    assert "error: Ray lost the node of this job" in (tmp_path / "log").read_text()
    produce(kafka, topic, frame[600:])
    done = subprocess.run(
        [*command, "--until-caught-up"], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    expected = brute_force(frame)
    assert online(store, sorted(expected)) == expected
    assert newest_offline(repo) == expected


@pytest.mark.parametrize("by_group", [False, True], ids=["supervisor", "group"])
def test_partitions_that_move_during_a_replay_lose_nothing_and_count_nothing_twice(
    kafka, ray_local, tmp_path, monkeypatch, by_group
):
    monkeypatch.setattr(topics, "LOOK_S", 1.0)
    repo, topic = tmp_path / "repo", f"moved-by-{'group' if by_group else 'supervisor'}"
    store = foreign_repo(repo, topic, kafka, "streaming.sinks.GuardedSqliteOnlineStore", integer_key=False)
    ensure_topics(kafka, {topic: 3})
    frame = edits(9_000, 200, integer_key=False, partitions=4)
    late_partition = frame["partition"] == 3  # made while the stream runs
    chunks = np.array_split(frame[~late_partition], 30)
    supervisor = Supervisor(store, plans(store, None), home=tmp_path / "home", workers=1, by_group=by_group)
    result: dict = {}
    thread = threading.Thread(target=lambda: result.update(supervisor.run()))

    def processed() -> int:
        return sum(row["processed"] for row in rows(tmp_path))

    def owners() -> int:
        return len({row["pid"] for row in rows(tmp_path)})

    producing = threading.Thread(target=lambda: [produce(kafka, topic, chunk) or time.sleep(0.4) for chunk in chunks])
    thread.start()
    try:
        wait_for(lambda: len(rows(tmp_path)) == 3, "the first worker")
        producing.start()
        wait_for(lambda: processed() > 500, "the first events")
        scale(tmp_path / "home" / "stream", 2)
        wait_for(lambda: owners() == 2, "a second worker")
        KafkaAdminClient(bootstrap_servers=kafka).create_partitions({topic: 4})
        wait_for(lambda: len(rows(tmp_path)) == 4, "the new partition")
        produce(kafka, topic, frame[late_partition])
        scale(tmp_path / "home" / "stream", 1)
        wait_for(lambda: len(rows(tmp_path)) == 4 and owners() == 1, "one worker again")
        producing.join()
        wait_for(lambda: processed() == 9_000, "all events")
        assert {row["lag"] for row in rows(tmp_path)} == {0}
        address = rows(tmp_path)[0]["metrics"]
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:  # noqa: S310
            scraped = answer.read().decode()
        assert sum(
            float(line.split()[-1])
            for line in scraped.splitlines()
            if line.startswith("millrace_stream_processed_total{")
        ) == pytest.approx(9_000)
        assert "millrace_stream_freshness_seconds_bucket" in scraped
    finally:
        supervisor.stop()
        thread.join(timeout=60)
    assert not thread.is_alive()
    assert (result["activity"]["processed"], result["activity"]["dead"], result["activity"]["late"]) == (9_000, 0, 0)
    expected = brute_force(frame)
    assert online(store, sorted(expected)) == expected
    assert newest_offline(repo) == expected
    assert overlapping(repo) == []


def test_a_second_job_over_the_same_view_takes_it_and_the_first_ends_with_a_sentence(kafka, ray_local, tmp_path):
    repo, topic = tmp_path / "repo", "computed-twice"
    store = foreign_repo(repo, topic, kafka, "streaming.sinks.GuardedSqliteOnlineStore", integer_key=False)
    ensure_topics(kafka, {topic: 1})
    frame = edits(1_000, 50, integer_key=False, partitions=1)
    produce(kafka, topic, frame[:500])
    errors: list[str] = []

    def run(supervisor: Supervisor) -> None:
        try:
            supervisor.run()
        except SupervisorError as error:
            errors.append(str(error))

    made = [Supervisor(store, plans(store, None), home=tmp_path / "home") for _ in range(2)]
    threads = [threading.Thread(target=run, args=(one,)) for one in made]
    try:
        threads[0].start()
        wait_for(lambda: [row["offset"] for row in rows(tmp_path)] == [500], "the first job's checkpoint")
        threads[1].start()
        wait_for(lambda: [row["epoch"] for row in rows(tmp_path) if row["epoch"] == 2], "the second job")
        produce(kafka, topic, frame[500:])
        threads[0].join(timeout=60)
        assert not threads[0].is_alive()
        (error,) = errors
        assert re.match("Another job computes the same view: Partition 0 of .* was taken over by epoch 2", error)
        wait_for(
            lambda: [(row["epoch"], row["offset"]) for row in rows(tmp_path)] == [(2, 1_000)], "the second job's end"
        )
    finally:
        for one, thread in zip(made, threads, strict=True):
            one.stop()
            if thread.ident:
                thread.join(timeout=60)
    expected = brute_force(frame)
    assert online(store, sorted(expected)) == expected
    assert newest_offline(repo) == expected


def overlapping(folder: Path) -> list:
    """Neighbouring parts of the offline log that hold a record both."""
    parts = [re.search(r"-(\d{5})-(\d+)-(\d+)\.parquet", path.name) for path in folder.glob("data/log/*.parquet")]
    spans = sorted(tuple(map(int, part.groups())) for part in parts if part)
    return [(one, two) for one, two in pairwise(spans) if one[0] == two[0] and one[2] > two[1] and two[2] > two[1]]


def test_a_changed_view_ends_with_a_sentence_and_goes_on_after_a_reset(kafka, tmp_path):
    repo, topic, checkpoints = tmp_path / "repo", "changed-actions", tmp_path / "far"
    store = foreign_repo(repo, topic, kafka, "sqlite", integer_key=True)
    environ = os.environ | {"MILLRACE_HOME": str(tmp_path / "home"), "RAY_AUTH_TOKEN": "", "OMP_NUM_THREADS": "1"}

    def job(*options: str) -> tuple[int, str, dict]:
        command = [sys.executable, "ray_jobs/stream_features.py", "--repo", str(repo), "--until-caught-up", *options]
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=180)
        return done.returncode, done.stderr, json.loads(done.stdout) if done.stdout else {}

    ensure_topics(kafka, {topic: 1})
    produce(kafka, topic, edits(500, 20, integer_key=True, partitions=1))
    place = ("--checkpoints", f"file://{checkpoints}")
    code, errors, result = job(*place)
    assert (code, result.get("views", {}).get("activity", {}).get("processed")) == (0, 500), errors
    before = {path.name: path.read_bytes() for path in checkpoints.rglob("*.checkpoint")}
    assert before
    assert not list((tmp_path / "home").rglob("*.checkpoint"))

    view = store.get_stream_feature_view("activity")
    view.aggregations = [one for one in view.aggregations if one.name != "mean_1h"]
    store.apply([view])
    code, errors, _ = job(*place)
    assert code == 2
    assert "aggregation mean of 'added' over 1h every 1h was removed" in errors.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in checkpoints.rglob("*.checkpoint")} == before

    code, errors, result = job(*place, "--reset", "activity")
    assert (code, result["views"]["activity"]["processed"]) == (0, 500), errors
    assert {path.name: path.read_bytes() for path in checkpoints.rglob("reset-*/*.checkpoint")} == before
    for options, sentence in (
        (("--checkpoints", "s4://nowhere"), "Checkpoints cannot be kept at 's4://nowhere'"),
        (("--reset", "activty"), "There is no 'activty' to reset: this stream computes activity."),
    ):
        code, errors, _ = job(*options)
        assert (code, sentence in errors.splitlines()[-1]) == (2, True), errors
