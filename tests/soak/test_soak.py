"""Random SIGKILLs of worker, job, Ray and broker under load: the values end as pandas says, nothing lost or doubled.

Features are those of a topic, or of a join of two. `MILLRACE_SOAK_SEEDS` says how many seeds are tried of each
(default 1); one takes about a minute.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
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
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.partitioner.default import murmur2

from ops.broker import Broker
from ops.ports import free_ports
from streaming.derived import interval_join
from streaming.rejects import identity
from streaming.report import read_views
from streaming.topics import ensure_topics

ROOT = Path(__file__).parents[2]
SEEDS = int(os.environ.get("MILLRACE_SOAK_SEEDS", "1"))
START = pd.Timestamp("2024-05-01T00:00:00Z")
EVENTS, PARTITIONS, CRASHES = 6_000, 2, 5
POISONED = range(50, EVENTS, EVENTS // 40)
PART = re.compile(r"-(\d{5})-(\d+)-(\d+)\.parquet")  # not one that covers no record
WINDOW, SLIDE = pd.Timedelta(minutes=10), pd.Timedelta(minutes=1)


def topic(name: str, servers: str, schema: str, log: FileSource) -> KafkaSource:
    return KafkaSource(
        name=name,
        topic=name,
        kafka_bootstrap_servers=servers,
        message_format=JsonFormat(schema_json=schema),
        timestamp_field="time",
        watermark_delay_threshold=timedelta(minutes=5),
        batch_source=log,
    )


def repository(folder: Path, servers: str, joined: bool) -> FeatureStore:
    (folder / "data").mkdir(parents=True)
    (folder / "feature_store.yaml").write_text(
        "project: soak\nprovider: local\nregistry: data/registry.db\nonline_store:\n"
        "  type: streaming.sinks.GuardedSqliteOnlineStore\n  path: data/online.db\noffline_store:\n  type: duckdb\n"
        "entity_key_serialization_version: 3\n"
    )
    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    log = FileSource(
        path=f"{folder}/data/log/*.parquet",
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column="created_timestamp",
    )
    source = topic("actions", servers, "time timestamp, user string, added bigint", log)
    if joined:
        prices = topic("prices", servers, "time timestamp, user string, price bigint", log)
        at_once = timedelta(0)
        source = interval_join("paid", source, prices, on="user", earliest=at_once, latest=at_once, batch_source=log)
    functions = {"count": Int64, "sum": Float64, "mean": Float64}
    view = StreamFeatureView(
        name="activity",
        entities=[user],
        source=source,
        timestamp_field="time",
        aggregations=[
            Aggregation(
                name=name,
                column="prices_price" if joined else "added",
                function=name,
                time_window=WINDOW.to_pytimedelta(),
                slide_interval=SLIDE.to_pytimedelta(),
            )
            for name in functions
        ],
        schema=[Field(name="user", dtype=String), *(Field(name=name, dtype=kind) for name, kind in functions.items())],
    )
    store = FeatureStore(repo_path=str(folder))
    store.apply([user, view])
    return store


def history(seed: int) -> pd.DataFrame:
    """Events out of order, the last of each partition a second after a full minute so that idling crosses no pane."""
    random_ = np.random.default_rng(seed)
    minutes = np.linspace(0, 120, EVENTS) + random_.uniform(0, 2, EVENTS)
    frame = pd.DataFrame(
        {
            "time": (START + pd.to_timedelta(minutes, unit="min")).floor("ms"),
            "user": [f"user {name}" for name in random_.zipf(1.5, EVENTS) % 200],
            "added": random_.integers(0, 1000, EVENTS),
        }
    )
    frame["price"] = random_.integers(0, 1000, EVENTS)
    frame["partition"] = [(murmur2(user.encode()) & 0x7FFFFFFF) % PARTITIONS for user in frame["user"]]
    for partition in range(PARTITIONS):
        last = frame.index[frame["partition"] == partition][-1]
        frame.loc[last, "time"] = START + pd.Timedelta(minutes=123, seconds=1)
    return frame


def pairs(frame: pd.DataFrame) -> pd.DataFrame:
    """What the join gives, the price in the place of what was added."""
    prices = frame[["time", "user", "price"]].rename(columns={"price": "added"})
    return frame.drop(columns=["added", "price"]).merge(prices, on=["time", "user"])


def oracle(frame: pd.DataFrame) -> dict:
    found = {}
    for _, partition in frame.groupby("partition"):
        end = partition["time"].max().floor(SLIDE) + SLIDE
        inside = partition[(partition["time"] >= end - WINDOW) & (partition["time"] < end)]
        for user in partition["user"].unique():
            added = inside.loc[inside["user"] == user, "added"].astype(float)
            mean = float(added.sum()) / len(added) if len(added) else None
            found[user] = {"count": len(added), "sum": float(added.sum()), "mean": mean}
    return found


def produce(servers: str, frame: pd.DataFrame, done: threading.Event) -> None:
    """Exactly once each, slowly; a broker that is killed is waited for."""
    producer = KafkaProducer(bootstrap_servers=servers, delivery_timeout_ms=90_000, reconnect_backoff_max_ms=500)
    for at, row in enumerate(frame.itertuples()):
        for name, field in (("actions", "added"), ("prices", "price")):
            event = {"time": row.time.isoformat(), "user": row.user, field: getattr(row, field)}
            value = json.dumps(event).encode()
            producer.send(name, key=row.user.encode(), value=value, partition=row.partition)
        if at in POISONED:
            producer.send("actions", key=row.user.encode(), value=b"{poison", partition=row.partition)
        if at % 60 == 0:
            time.sleep(0.2)
    producer.flush(timeout=90)
    producer.close()
    done.set()


def dead(servers: str) -> set:
    consumer = KafkaConsumer(bootstrap_servers=servers, auto_offset_reset="earliest")
    at = TopicPartition("actions.dead", 0)
    consumer.assign([at])
    found: set = set()
    end = consumer.end_offsets([at])[at]
    while consumer.position(at) < end:
        found |= {identity(one.headers) for batch in consumer.poll(500).values() for one in batch}
    consumer.close()
    return found


class Stream:
    """The stream job on a Ray of its own; whenever it is found ended it is started again."""

    def __init__(self, folder: Path, servers: str) -> None:
        self._folder = folder
        self._environ = os.environ | {
            "MILLRACE_HOME": str(folder / "home"),
            "KAFKA_BOOTSTRAP_SERVERS": servers,
            "RAY_AUTH_TOKEN": "",
            "OMP_NUM_THREADS": "1",
        }
        self._job: subprocess.Popen | None = None

    def job(self) -> subprocess.Popen:
        if self._job is None or self._job.poll() is not None:
            command = [sys.executable, "ray_jobs/stream_features.py", "--repo", str(self._folder / "repo")]
            with (self._folder / "job.log").open("a") as log:
                self._job = subprocess.Popen(
                    [*command, "--workers", "2"],
                    cwd=ROOT,
                    env=self._environ,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        return self._job

    def rows(self) -> dict[str, list[dict]]:
        """What it says of the partitions of a view or join."""
        views = read_views(self._folder / "home" / "stream")
        return {name: list(partitions.values()) for name, partitions in views.items()}

    def total(self, view: str, figure: str) -> int:
        return sum(row[figure] for row in self.rows().get(view, []))

    def kill(self) -> None:
        if self._job is not None and self._job.poll() is None:
            os.killpg(self._job.pid, signal.SIGKILL)
            self._job.wait()

    def kill_worker(self, dice: random.Random) -> None:
        if pids := sorted({row["pid"] for rows in self.rows().values() for row in rows}):
            with suppress(ProcessLookupError):
                os.kill(dice.choice(pids), signal.SIGKILL)

    def kill_ray(self, dice: random.Random) -> None:
        """Kills one of the two processes that Ray can't live without, once they have started."""
        below = psutil.Process(self.job().pid).children(recursive=True)
        if parts := [one for one in below if one.name() in ("raylet", "gcs_server")]:
            dice.choice(parts).kill()

    def stop(self) -> None:
        job = self.job()
        os.kill(job.pid, signal.SIGTERM)
        job.wait(90)


def crash_at_random(stream: Stream, broker: Broker, pid: int, dice: random.Random) -> None:
    for _ in range(CRASHES):
        time.sleep(dice.uniform(1, 6))
        stream.job()
        what = dice.choice(["worker", "worker", "job", "ray", "broker"])
        if what == "worker":
            stream.kill_worker(dice)
        elif what == "job":
            stream.kill()
            stream.job()
        elif what == "ray":
            stream.kill_ray(dice)
        else:
            os.kill(pid, signal.SIGKILL)
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).wait(10)  # it holds its ports for a moment longer
            time.sleep(dice.uniform(0, 2))
            pid = broker.start().pid


def catch_up(stream: Stream, events: int) -> None:
    deadline = time.monotonic() + 180
    while stream.total("activity", "processed") < events:
        assert time.monotonic() < deadline, stream.rows()
        stream.job()
        time.sleep(0.5)


def check_values(store: FeatureStore, log: Path, expected: dict) -> None:
    """Online store and newest rows of the log equal the oracle; no record is logged twice."""
    names = ("count", "sum", "mean")
    read = store.get_online_features(
        [f"activity:{name}" for name in names], [{"user": user} for user in sorted(expected)]
    ).to_dict()
    assert {user: {name: read[name][at] for name in names} for at, user in enumerate(read["user"])} == expected
    newest = duckdb.sql(
        f"SELECT DISTINCT ON (user) * FROM '{log}/*.parquet'"
        " ORDER BY user, event_timestamp DESC, created_timestamp DESC"
    ).to_arrow_table()
    assert {row["user"]: {name: row[name] for name in names} for row in newest.to_pylist()} == expected
    found = [PART.search(path.name) for path in log.glob("*.parquet")]
    spans = sorted(tuple(map(int, part.groups())) for part in found if part)
    assert all(one[0] != two[0] or one[2] <= two[1] for one, two in pairwise(spans))


@pytest.mark.parametrize("joined", [False, True], ids=["topic", "join"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_values_after_random_kills_equal_the_oracle(seed, joined, tmp_path):
    port, controller = free_ports(2)
    broker = Broker(tmp_path / "kafka", log=tmp_path / "kafka.log", port=port, controller_port=controller)
    pid = broker.start().pid
    servers = broker.bootstrap_servers
    stream = Stream(tmp_path, servers)
    frame = history(seed)
    expected = pairs(frame) if joined else frame
    try:
        store = repository(tmp_path / "repo", servers, joined)
        ensure_topics(servers, {"actions": PARTITIONS, "prices": PARTITIONS, "actions.dead": 1, "actions.late": 1})
        produced = threading.Event()
        threading.Thread(target=produce, args=(servers, frame, produced), daemon=True).start()
        crash_at_random(stream, broker, pid, random.Random(seed))  # noqa: S311 (not a secret)
        assert produced.wait(180)
        catch_up(stream, len(expected))
        stream.stop()
        assert {figure: stream.total("activity", figure) for figure in ("processed", "late", "lag")} == {
            "processed": len(expected),
            "late": 0,
            "lag": 0,
        }
        assert stream.total("paid" if joined else "activity", "dead") == len(POISONED)
        check_values(store, tmp_path / "repo" / "data" / "log", oracle(expected))
        assert len(dead(servers)) == len(POISONED)
    finally:
        stream.kill()
        broker.stop()
