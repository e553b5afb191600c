"""Derived topics for real: exactly once under SIGKILL, zombies fenced, and features over them equal pandas."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
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
from streaming.consumer import Consumer
from streaming.derived import rekeyed
from streaming.deriving.derivation import TAG, Derivation
from streaming.deriving.deriver import Deriver
from streaming.deriving.rekeying import Rekeying
from streaming.deriving.transactions import Transactions, group
from streaming.rejects import RejectLog
from streaming.report import read_views
from streaming.supervisor import Supervisor
from streaming.topics import ensure_topics
from streaming.views import derivations, plans
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
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


def rekeying(servers: str, topic: str, home: Path) -> Deriver:
    source = rekeyed(f"{topic}-by-page", edits_source(servers, topic), "page")
    derivation = Derivation.from_json(source.name, source.tags[TAG])
    return Deriver(
        derivation,
        sources=[Consumer(servers, topic, group(derivation))],
        rejects=[RejectLog(servers, topic, derivation.name)],
        checkpoints=CheckpointStore(str(home)),
        operator=lambda number, states: Rekeying(derivation),
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

    def status(name: str) -> dict[str, dict]:
        return read_views(tmp_path / "home" / "stream").get(name, {})

    chunks = np.array_split(frame, 24)
    producing = threading.Thread(
        target=lambda: [produce(kafka, topic, chunk) or time.sleep(0.5) for chunk in chunks], daemon=True
    )
    thread.start()
    try:
        wait_for(lambda: len(status("edits_by_page")) == 2, "the first workers", 180)
        producing.start()
        killed: set[int] = set()

        def deriving() -> list[int]:
            """Workers that have committed something since they began."""
            rows = status("edits_by_page").values()
            return [row["pid"] for row in rows if row["read"] > 0 and row["derived"] > 0 and row["pid"] not in killed]

        for _ in range(3):
            wait_for(deriving, lambda: f"a worker to kill: {status('edits_by_page')}", 180)
            victim = deriving()[0]
            killed.add(victim)
            os.kill(victim, signal.SIGKILL)
        producing.join()
        wait_for(
            lambda: (
                sum(row["processed"] for row in status("page_activity").values()) == 6_000
                and sum(row["lag"] for row in status("page_activity").values()) == 0
            ),
            lambda: f"all events: {status('edits_by_page')} {status('page_activity')}",
            timeout_s=180,
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


FEATURES = """
from datetime import timedelta

from feast import Entity, FeatureView, Field, FileSource, KafkaSource, ValueType
from feast.aggregation import Aggregation
from feast.data_format import JsonFormat, ParquetFormat
from feast.stream_feature_view import StreamFeatureView
from feast.types import Float64, Int64, String

from streaming.derived import as_of_join, feature_lookup, interval_join, rekeyed, table_lookup


def stream(name, schema):
    return KafkaSource(
        name=name, topic=name, kafka_bootstrap_servers="{servers}", message_format=JsonFormat(schema_json=schema),
        timestamp_field="time", watermark_delay_threshold=timedelta(minutes=5), batch_source=log(name),
    )


def log(name):
    return FileSource(name=name + "_log", path="{folder}/data/" + name + "/*.parquet", file_format=ParquetFormat(),
                      timestamp_field="event_timestamp", created_timestamp_column="created_timestamp")


edits = stream("edits", "seq bigint, time timestamp, user string, page string, delta bigint")
ages = stream("ages", "time timestamp, user string, age double")
predictions = stream("predictions", "seq bigint, id string, time timestamp, model string, score double")
labels = stream("labels", "id string, time timestamp, label double")
accounts = FileSource(name="accounts", path="data/accounts.parquet", timestamp_field="valid_from")

by_page = rekeyed("by_page", edits, key="page", batch_source=log("pages"))
labelled = interval_join("labelled", predictions, labels, on="id", earliest=timedelta(0), latest=timedelta(minutes=30),
                         unmatched=True)
by_model = rekeyed("by_model", labelled, key="model", batch_source=log("models"))
aged = as_of_join("aged", edits, ages, on="user", tolerance=timedelta(hours=1), batch_source=log("aging"))
described = table_lookup("described", edits, accounts, on="user", batch_source=log("described_users"))
enriched = feature_lookup("enriched", edits, ["profile:level"], on="user", batch_source=log("enriched_users"))

names = ("user", "page", "model")
entities = {{name: Entity(name=name, join_keys=[name], value_type=ValueType.STRING) for name in names}}
user, page, model = entities.values()
profile = FeatureView(name="profile", entities=[user], ttl=timedelta(0), source=log("profile"),
                      schema=[Field(name="user", dtype=String), Field(name="level", dtype=Float64)])


def view(name, source, entity, column):
    return StreamFeatureView(
        name=name, entities=[entity], source=source, timestamp_field="time",
        aggregations=[Aggregation(name=f"events", column="seq", function="count"),
                      Aggregation(name=f"known", column=column, function="count"),
                      Aggregation(name=f"total", column=column, function="sum")],
        schema=[Field(name=entity.join_key, dtype=String), Field(name="events", dtype=Int64),
                Field(name="known", dtype=Int64), Field(name="total", dtype=Float64)],
    )


pages = view("pages", by_page, page, "delta")
models = view("models", by_model, model, "labels_label")
aging = view("aging", aged, user, "ages_age")
described_users = view("described_users", described, user, "accounts_rank")
enriched_users = view("enriched_users", enriched, user, "profile_level")
"""
VIEWS = {
    "pages": ("by_page", "page", "delta"),
    "models": ("by_model", "model", "labels_label"),
    "aging": ("aged", "user", "ages_age"),
    "described_users": ("described", "user", "accounts_rank"),
    "enriched_users": ("enriched", "user", "profile_level"),
}


def send(servers: str, topic: str, frame: pd.DataFrame, key: str) -> None:
    ensure_topics(servers, {topic: 2})
    producer = KafkaProducer(bootstrap_servers=servers, linger_ms=10)
    for row in frame.to_dict("records"):
        event = {name: value.isoformat() if name == "time" else value for name, value in row.items()}
        event = {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in event.items()}
        producer.send(topic, key=row[key].encode(), value=json.dumps(event).encode())
    producer.flush()
    producer.close()


def moments(random: np.random.Generator, count: int) -> pd.Series:
    """Distinct times of three hours, rising but for a minute."""
    minutes = np.sort(random.uniform(0, 180, count)) + random.uniform(0, 1, count)
    return START + pd.to_timedelta(pd.Series(minutes), unit="min").dt.floor("us")


def inputs(seed: int) -> dict[str, pd.DataFrame]:
    random = np.random.default_rng(seed)
    users = np.array([f"user {n}" for n in range(12)])
    ids = np.array([f"id {n}" for n in range(150)])
    return {
        "edits": pd.DataFrame(
            {
                "seq": range(300),
                "time": moments(random, 300),
                "user": random.choice(users, 300),
                "page": [f"page {n}" for n in random.integers(0, 30, 300)],
                "delta": random.integers(0, 100, 300),
            }
        ),
        "ages": pd.DataFrame(
            {"time": moments(random, 60), "user": random.choice(users[:10], 60), "age": random.uniform(0, 9, 60)}
        ),
        "predictions": pd.DataFrame(
            {
                "seq": range(200),
                "id": random.choice(ids, 200),
                "time": moments(random, 200),
                "model": random.choice(["a", "b", "c"], 200),
                "score": random.uniform(0, 1, 200),
            }
        ),
        "labels": pd.DataFrame(
            {"id": random.choice(ids, 220), "time": moments(random, 220), "label": random.integers(0, 2, 220) * 1.0}
        ),
        "accounts": pd.DataFrame(
            {"user": random.choice(users[2:], 40), "valid_from": moments(random, 40), "rank": random.integers(1, 9, 40)}
        ),
        "profile": pd.DataFrame({"user": users[1:], "level": random.uniform(0, 5, 11)}),
    }


def pandas_joins(given: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """What each derived topic must hold: its own field `seq` of the left side, and the field that was joined."""
    edits, predictions = given["edits"].sort_values("time"), given["predictions"]
    pairs = predictions.merge(given["labels"].rename(columns={"time": "labels_time"}), on="id", how="left")
    apart = pairs["labels_time"] - pairs["time"]
    matched = pairs[(apart >= pd.Timedelta(0)) & (apart <= 30 * MINUTE)]
    unmatched = predictions[~predictions["seq"].isin(matched["seq"])]
    ages = given["ages"].sort_values("time")
    accounts = given["accounts"].sort_values("valid_from").rename(columns={"valid_from": "time"})
    return {
        "by_page": edits,
        "by_model": pd.concat([matched, unmatched]).rename(columns={"label": "labels_label"}),
        "aged": pd.merge_asof(edits, ages, on="time", by="user", tolerance=60 * MINUTE).rename(
            columns={"age": "ages_age"}
        ),
        "described": pd.merge_asof(edits, accounts, on="time", by="user").rename(columns={"rank": "accounts_rank"}),
        "enriched": edits.merge(given["profile"].rename(columns={"level": "profile_level"}), on="user", how="left"),
    }


def rows(pairs: list) -> list:
    return sorted((seq, -1.0 if value is None or pd.isna(value) else float(value)) for seq, value in pairs)


def test_the_job_computes_every_kind_of_derived_topic_of_a_feature_repository(kafka, tmp_path):
    repo, given = tmp_path / "repo", inputs(5)
    foreign_store(repo)
    (repo / "features.py").write_text(FEATURES.format(servers=kafka, folder=repo))
    given["accounts"].sort_values("valid_from").to_parquet(repo / "data" / "accounts.parquet")
    environ = os.environ | {"MILLRACE_HOME": str(tmp_path / "home"), "RAY_AUTH_TOKEN": "", "OMP_NUM_THREADS": "1"}
    feast = Path(sys.executable).with_name("feast")
    subprocess.run([feast, "--chdir", repo, "apply"], check=True, env=environ | {"PYTHONPATH": str(ROOT)}, timeout=120)
    store = FeatureStore(repo_path=str(repo))
    profile = given["profile"].assign(event_timestamp=START, created_timestamp=START)
    store.write_to_online_store("profile", profile)
    for topic, key in (("edits", "user"), ("ages", "user"), ("predictions", "id"), ("labels", "id")):
        send(kafka, topic, given[topic], key)

    command = [sys.executable, "ray_jobs/stream_features.py", "--repo", str(repo), "--until-caught-up"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])["views"]
    assert {name for name, row in counts.items() if row["dead"] or row["late"]} == set()
    expected = pandas_joins(given)
    assert counts["labelled"]["processed"] == 420
    for name, (topic, entity, column) in VIEWS.items():
        joined = expected[topic]
        found = [json.loads(one.value) for each in committed(kafka, topic, 2, len(joined)).values() for one in each]
        assert rows([(one["seq"], one[column]) for one in found]) == rows(joined[["seq", column]].to_numpy().tolist())
        sums = joined.groupby(entity).agg(events=("seq", "size"), known=(column, "count"), total=(column, "sum"))
        read = store.get_online_features(
            features=[f"{name}:{feature}" for feature in sums.columns],
            entity_rows=[{entity: value} for value in sums.index],
        ).to_dict()
        assert read["events"] == sums["events"].tolist()
        assert read["known"] == sums["known"].tolist()
        assert read["total"] == pytest.approx(sums["total"].tolist(), rel=1e-12)
