"""Derived topics for real: exactly once under SIGKILL, zombies fenced, and features over them equal pandas."""

import json
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from feast import Entity, FeatureStore, Field, FileSource, KafkaSource, ValueType
from feast.aggregation import Aggregation
from feast.data_format import JsonFormat, ParquetFormat
from feast.stream_feature_view import StreamFeatureView
from feast.types import Float64, Int64, String
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.partitioner.default import murmur2

from streaming.checkpoint import CheckpointStore, StaleEpochError
from streaming.derivation import TAG, Derivation
from streaming.derived import rekeyed
from streaming.deriving import Deriver
from streaming.rejects import RejectLog
from streaming.rekeying import Rekeying
from streaming.supervisor import Supervisor
from streaming.topics import ensure_topics
from streaming.transactions import Transactions, group
from streaming.views import derivations, plans
from streaming.wire import Consumer

START = pd.Timestamp("2024-05-01T00:00:00Z")
MINUTE = pd.Timedelta(minutes=1)
WINDOWS = {"10m": (10 * MINUTE, MINUTE), "1h": (60 * MINUTE, 60 * MINUTE)}
FUNCTIONS = {"count": Int64, "sum": Float64, "mean": Float64}


def offline(folder: Path, view: str) -> FileSource:
    return FileSource(
        name=f"{view}_log",
        path=f"{folder}/data/{view}/*.parquet",
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column="created_timestamp",
    )


def edits_source(servers: str, topic: str) -> KafkaSource:
    return KafkaSource(
        name="edits",
        topic=topic,
        kafka_bootstrap_servers=servers,
        message_format=JsonFormat(schema_json="seq bigint, time timestamp, user string, page string, delta bigint"),
        timestamp_field="time",
        watermark_delay_threshold=timedelta(minutes=5),
    )


def activity(folder: Path, source: KafkaSource) -> StreamFeatureView:
    """Windows over the edits of a page."""
    return StreamFeatureView(
        name="page_activity",
        entities=[Entity(name="article", join_keys=["page"], value_type=ValueType.STRING)],
        source=source,
        timestamp_field="time",
        aggregations=[
            Aggregation(
                name=f"{function}_{name}", column="delta", function=function, time_window=size, slide_interval=slide
            )
            for name, (size, slide) in WINDOWS.items()
            for function in FUNCTIONS
        ],
        schema=[
            Field(name="page", dtype=String),
            *(Field(name=f"{function}_{name}", dtype=kind) for name in WINDOWS for function, kind in FUNCTIONS.items()),
        ],
    )


def foreign_store(folder: Path) -> FeatureStore:
    (folder / "data").mkdir(parents=True)
    (folder / "feature_store.yaml").write_text(
        "project: derived\nprovider: local\nregistry: data/registry.db\n"
        "online_store:\n  type: streaming.sinks.GuardedSqliteOnlineStore\n  path: data/online.db\n"
        "offline_store:\n  type: duckdb\nentity_key_serialization_version: 3\n"
    )
    return FeatureStore(repo_path=str(folder))


def edits(count: int) -> pd.DataFrame:
    """Edits of three hours, a little out of order, each in the partition of its user; the last ones set all clocks."""
    random = np.random.default_rng(3)
    minutes = np.linspace(0, 179, count) + random.uniform(0, 2, count)
    frame = pd.DataFrame(
        {
            "seq": range(count),
            "time": START + pd.to_timedelta(minutes, unit="min").floor("ms"),
            "user": [f"user {name}" for name in random.zipf(1.5, count) % 300],
            "page": [f"Page “{name}”" for name in random.zipf(1.3, count) % 200],
            "delta": [None if value < 20 else int(value) for value in random.integers(0, 1000, count)],
        }
    )
    frame["partition"] = [zlib.crc32(user.encode()) % 2 for user in frame["user"]]
    frame["derived"] = [(murmur2(page.encode()) & 0x7FFFFFFF) % 2 for page in frame["page"]]
    # The clocks end one second after a full minute, so the seconds that a live worker idles cross no pane.
    for derived in (0, 1):
        frame.loc[frame.index[frame["derived"] == derived][-1], "time"] = START + 181 * MINUTE + pd.Timedelta(seconds=1)
    return frame


def values(frame: pd.DataFrame) -> list[bytes]:
    return [
        json.dumps(
            {
                "seq": row.seq,
                "time": row.time.isoformat(),
                "user": row.user,
                "page": row.page,
                "delta": None if pd.isna(row.delta) else int(row.delta),
            },
            ensure_ascii=row.seq % 2 == 0,
        ).encode()
        for row in frame.itertuples()
    ]


def produce(servers: str, topic: str, frame: pd.DataFrame) -> None:
    producer = KafkaProducer(bootstrap_servers=servers, linger_ms=10)
    for row, value in zip(frame.itertuples(), values(frame), strict=True):
        producer.send(topic, key=row.user.encode(), value=value, partition=row.partition)
    producer.flush()
    producer.close()


def brute_force(frame: pd.DataFrame) -> dict:
    """Page to the values of the windows that hold at the end."""
    clock, found = frame["time"].max(), {}
    for page, rows in frame.groupby("page"):
        found[page] = {}
        for name, (size, slide) in WINDOWS.items():
            end = clock.floor(slide) + slide
            delta = rows.loc[(rows["time"] >= end - size) & (rows["time"] < end), "delta"].dropna().astype(float)
            found[page] |= {f"count_{name}": len(delta), f"sum_{name}": float(delta.sum())}
            found[page][f"mean_{name}"] = float(delta.mean()) if len(delta) else None
    return found


def online(store: FeatureStore, pages: list) -> dict:
    names = [f"{function}_{name}" for name in WINDOWS for function in FUNCTIONS]
    read = store.get_online_features(
        features=[f"page_activity:{name}" for name in names], entity_rows=[{"page": page} for page in pages]
    ).to_dict()
    return {page: {name: read[name][row] for name in names} for row, page in enumerate(read["page"])}


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.1)


def committed(servers: str, topic: str, partitions: int, count: int) -> dict[int, list]:
    """The records of each partition, as kafka-python's own reader shows them."""
    consumer = KafkaConsumer(bootstrap_servers=servers, auto_offset_reset="earliest", isolation_level="read_committed")
    consumer.assign([TopicPartition(topic, number) for number in range(partitions)])
    found: dict[int, list] = {number: [] for number in range(partitions)}
    empty, deadline = 0, time.monotonic() + 60
    while (sum(map(len, found.values())) < count or empty < 2) and time.monotonic() < deadline:
        polled = consumer.poll(timeout_ms=300)
        empty = 0 if polled else empty + 1
        for at, records in polled.items():
            found[at.partition] += records
    consumer.close()
    return found


def check_exactly_once(servers: str, topic: str, frame: pd.DataFrame) -> None:
    """Each record once, unchanged, under its new key, in the order of its input partition."""
    found = committed(servers, topic, 2, len(frame))
    expected = values(frame)
    for derived, records in found.items():
        for partition in (0, 1):
            mine = frame[(frame["derived"] == derived) & (frame["partition"] == partition)]
            of_partition = [
                one for one in records if zlib.crc32(json.loads(one.value)["user"].encode()) % 2 == partition
            ]
            assert [one.value for one in of_partition] == [expected[seq] for seq in mine["seq"]]
            assert [one.key.decode() for one in of_partition] == mine["page"].tolist()


def test_features_over_a_rekeyed_topic_equal_pandas_after_sigkills_in_the_middle_of_transactions(
    kafka, ray_local, tmp_path
):
    repo, topic = tmp_path / "repo", "killed-wiki-edits"
    store = foreign_store(repo)
    source = rekeyed("edits_by_page", edits_source(kafka, topic), "page", batch_source=offline(repo, "page_activity"))
    view = activity(repo, source)
    store.apply([Entity(name="article", join_keys=["page"], value_type=ValueType.STRING), view])
    ensure_topics(kafka, {topic: 2})
    frame = edits(6_000)
    compiled = plans(store, None)
    needed = derivations(store, ["page_activity"])
    assert [one.name for one in needed] == ["edits_by_page"]
    supervisor = Supervisor(store, [*needed, *compiled], home=tmp_path / "home", workers=2)
    result: dict = {}
    thread = threading.Thread(target=lambda: result.update(supervisor.run()))
    status_path = tmp_path / "home" / "stream" / "status.json"

    def status(name: str) -> dict[str, dict]:
        return json.loads(status_path.read_text())["views"].get(name, {}) if status_path.exists() else {}

    chunks = np.array_split(frame, 24)
    producing = threading.Thread(
        target=lambda: [produce(kafka, topic, chunk) or time.sleep(0.5) for chunk in chunks], daemon=True
    )
    thread.start()
    try:
        wait_for(lambda: len(status("edits_by_page")) == 2, "the first workers")
        producing.start()
        killed = set()
        for turn, seconds in enumerate((1.0, 0.7, 0.4)):
            wait_for(lambda: {row["pid"] for row in status("edits_by_page").values()} - killed, "a live worker")
            time.sleep(seconds)
            rows = status("edits_by_page")
            victim = rows[sorted(rows)[turn % len(rows)]]["pid"]
            if victim not in killed:
                os.kill(victim, signal.SIGKILL)
                killed.add(victim)
        producing.join()
        wait_for(
            lambda: (
                sum(row["processed"] for row in status("page_activity").values()) == 6_000
                and sum(row["lag"] for row in status("page_activity").values()) == 0
            ),
            "all events",
        )
        assert max(row["epoch"] for row in status("edits_by_page").values()) >= 2
    finally:
        supervisor.stop()
        thread.join(timeout=90)
    assert not thread.is_alive()
    for name in ("edits_by_page", "page_activity"):
        assert (result[name]["processed"], result[name]["dead"], result[name]["late"]) == (6_000, 0, 0), name
    check_exactly_once(kafka, "edits_by_page", frame)
    expected = brute_force(frame)
    assert online(store, sorted(expected)) == expected


def rekeying(servers: str, topic: str, home: Path) -> Deriver:
    source = rekeyed(f"{topic}-by-page", edits_source(servers, topic), "page")
    derivation = Derivation.from_json(source.name, source.tags[TAG])
    return Deriver(
        derivation,
        sources=[Consumer(servers, topic, group(derivation))],
        rejects=[RejectLog(servers, topic, derivation.name)],
        checkpoints=CheckpointStore(str(home)),
        operator=lambda number, state: Rekeying(derivation),
        output=lambda number: Transactions(derivation, number),
        ticking=False,
        keyed=True,
    )


def test_a_zombie_is_fenced_and_two_workers_keep_partitions_together_in_a_replay(kafka, tmp_path):
    topic = "zombie-edits"
    ensure_topics(kafka, {topic: 2, f"{topic}-by-page": 2, f"{topic}.dead": 1, f"{topic}.late": 1})
    frame = edits(4_000)
    produce(kafka, topic, frame[:1_000])
    zombie = rekeying(kafka, topic, tmp_path)
    zombie.start({0: 1, 1: 1})
    while not zombie.step() or zombie.holds() != {0, 1}:
        pass
    owners = [rekeying(kafka, topic, tmp_path) for _ in range(2)]
    for number, owner in enumerate(owners):
        owner.start({number: 2})
    with pytest.raises(StaleEpochError):
        for _ in range(2_000):
            zombie.step()
        raise AssertionError("the zombie goes on")
    zombie.close()
    produce(kafka, topic, frame[1_000:])
    threads = [threading.Thread(target=owner.run, args=(threading.Event(), True)) for owner in owners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=90)
    for owner in owners:
        owner.close()
    check_exactly_once(kafka, f"{topic}-by-page", frame)
    # No record comes later than the delay of the derived source, though two workers replayed three hours at once.
    delay = timedelta(microseconds=owners[0].plan.delay_us)
    for records in committed(kafka, f"{topic}-by-page", 2, len(frame)).values():
        times = pd.to_datetime([json.loads(one.value)["time"] for one in records], utc=True, format="ISO8601")
        assert (times.to_series().cummax().to_numpy() - times.to_numpy()).max() <= np.timedelta64(delay)
