"""Random SIGKILLs of worker, job, Ray and broker under load: the values end as pandas says, nothing lost or doubled.

`MILLRACE_SOAK_SEEDS` says how many seeds are tried (default 1); one takes about a minute.
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
import zlib
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
from kafka.errors import KafkaError

from ops.broker import Broker
from ops.ports import free_ports
from streaming.rejects import identity
from streaming.topics import ensure_topics

ROOT = Path(__file__).parents[2]
SEEDS = int(os.environ.get("MILLRACE_SOAK_SEEDS", "1"))
START = pd.Timestamp("2024-05-01T00:00:00Z")
EVENTS, PARTITIONS, POISON, CRASHES = 6_000, 2, 40, 5
PART = re.compile(r"-(\d{5})-(\d+)-(\d+)\.parquet")  # not one that covers no record
WINDOW, SLIDE = pd.Timedelta(minutes=10), pd.Timedelta(minutes=1)


def repository(folder: Path, servers: str) -> FeatureStore:
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
    source = KafkaSource(
        name="actions",
        topic="actions",
        kafka_bootstrap_servers=servers,
        message_format=JsonFormat(schema_json="time timestamp, user string, added bigint"),
        timestamp_field="time",
        watermark_delay_threshold=timedelta(minutes=5),
        batch_source=log,
    )
    functions = {"count": Int64, "sum": Float64, "mean": Float64}
    view = StreamFeatureView(
        name="activity",
        entities=[user],
        source=source,
        timestamp_field="time",
        aggregations=[
            Aggregation(
                name=name,
                column="added",
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
    frame["partition"] = [zlib.crc32(user.encode()) % PARTITIONS for user in frame["user"]]
    for partition in range(PARTITIONS):
        last = frame.index[frame["partition"] == partition][-1]
        frame.loc[last, "time"] = START + pd.Timedelta(minutes=123, seconds=1)
    return frame


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
    poison = set(range(50, EVENTS, EVENTS // POISON))
    for at, row in enumerate(frame.itertuples()):
        value = json.dumps({"time": row.time.isoformat(), "user": row.user, "added": row.added}).encode()
        producer.send("actions", key=row.user.encode(), value=value, partition=row.partition)
        if at in poison:
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


def ray_parts(job: subprocess.Popen) -> list[psutil.Process]:
    """What a job's own Ray can't live without, once it has started."""
    return [one for one in psutil.Process(job.pid).children(recursive=True) if one.name() in ("raylet", "gcs_server")]


def wait_gone(pid: int) -> None:
    """A process that was killed holds its ports for a moment longer."""
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(10)


def rows(status: Path) -> list[dict]:
    try:
        return list(json.loads(status.read_text())["views"].get("activity", {}).values())
    except FileNotFoundError:
        return []


@pytest.mark.parametrize("seed", range(SEEDS))
def test_values_after_random_kills_equal_the_oracle(seed, tmp_path):
    dice = random.Random(seed)  # noqa: S311 (not a secret)
    port, controller = free_ports(2)
    broker = Broker(tmp_path / "kafka", log=tmp_path / "kafka.log", port=port, controller_port=controller)
    kafka = broker.start()
    servers = broker.bootstrap_servers
    status = tmp_path / "home" / "stream" / "status.json"
    environ = os.environ | {
        "MILLRACE_HOME": str(tmp_path / "home"),
        "KAFKA_BOOTSTRAP_SERVERS": servers,
        "RAY_AUTH_TOKEN": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "ray_jobs/stream_features.py", "--repo", str(tmp_path / "repo"), "--workers", "2"]

    def start() -> subprocess.Popen:
        with (tmp_path / "job.log").open("a") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True)

    frame = history(seed)
    job = None
    try:
        store = repository(tmp_path / "repo", servers)
        ensure_topics(servers, {"actions": PARTITIONS, "actions.dead": 1, "actions.late": 1})
        produced = threading.Event()
        threading.Thread(target=produce, args=(servers, frame, produced), daemon=True).start()
        job = start()
        for _ in range(CRASHES):
            time.sleep(dice.uniform(1, 6))
            job = job if job.poll() is None else start()
            what = dice.choice(["worker", "worker", "job", "ray", "broker"])
            pids = sorted({row["pid"] for row in rows(status)})
            if what == "worker" and pids:
                try:
                    os.kill(dice.choice(pids), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            elif what == "job":
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
                job = start()
            elif what == "ray" and job.poll() is None and (parts := ray_parts(job)):
                dice.choice(parts).kill()
            elif what == "broker":
                os.kill(kafka.pid, signal.SIGKILL)
                wait_gone(kafka.pid)
                time.sleep(dice.uniform(0, 2))
                kafka = broker.start()
        assert produced.wait(180)
        poison = len(range(50, EVENTS, EVENTS // POISON))
        deadline = time.monotonic() + 180
        while sum(row["processed"] + row["dead"] + row["late"] for row in rows(status)) < EVENTS + poison:
            assert time.monotonic() < deadline, f"seed {seed}: {rows(status)}"
            job = job if job.poll() is None else start()
            time.sleep(0.5)
        os.kill(job.pid, signal.SIGTERM)
        job.wait(90)
        totals = {name: sum(row[name] for row in rows(status)) for name in ("processed", "dead", "late", "lag")}
        assert totals == {"processed": EVENTS, "dead": poison, "late": 0, "lag": 0}
        expected = oracle(frame)
        read = store.get_online_features(
            [f"activity:{name}" for name in ("count", "sum", "mean")], [{"user": user} for user in sorted(expected)]
        ).to_dict()
        names = ("count", "sum", "mean")
        assert {user: {name: read[name][at] for name in names} for at, user in enumerate(read["user"])} == expected
        newest = duckdb.sql(
            f"SELECT DISTINCT ON (user) * FROM '{tmp_path}/repo/data/log/*.parquet'"
            " ORDER BY user, event_timestamp DESC, created_timestamp DESC"
        ).to_arrow_table()
        assert {row["user"]: {name: row[name] for name in names} for row in newest.to_pylist()} == expected
        found = [PART.search(path.name) for path in (tmp_path / "repo/data/log").glob("*.parquet")]
        spans = sorted(tuple(map(int, part.groups())) for part in found if part)
        assert all(one[0] != two[0] or one[2] <= two[1] for one, two in pairwise(spans)), "no record is logged twice"
        assert len(dead(servers)) == poison
    except KafkaError as error:
        raise AssertionError(f"seed {seed}") from error
    finally:
        if job is not None and job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
        broker.stop()
