"""Feast's face over a real broker: what is asked for is written, and a start goes on where the last one stopped."""

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import pytest
from feast import Entity, FeatureStore, Field, FileSource, KafkaSource, ValueType
from feast.aggregation import Aggregation
from feast.data_format import JsonFormat, ParquetFormat
from feast.data_source import PushMode
from feast.stream_feature_view import StreamFeatureView
from feast.types import Float64, Int64, String
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from streaming.checkpoint import StaleEpochError
from streaming.opening import Settings, checkpoint_uri, open_worker
from streaming.stream_processor import Ingestion, MillraceStreamProcessor
from streaming.topics import count_partitions, ensure_topics
from streaming.views import plans
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
START = datetime(2024, 5, 1, tzinfo=UTC)
PARTITIONS = 2


def applied(folder: Path, topic: str, servers: str) -> FeatureStore:
    """A Feast repository with one view: the events ever, which no clock changes, and the sum of an hour."""
    folder.mkdir()
    (folder / "feature_store.yaml").write_text(
        "project: face\nprovider: local\nregistry: registry.db\nentity_key_serialization_version: 3\n"
        "online_store: {type: streaming.sinks.GuardedSqliteOnlineStore, path: online.db}\n"
        "offline_store: {type: duckdb}\n"
    )
    user = Entity(name="person", join_keys=["user"], value_type=ValueType.STRING)
    source = KafkaSource(
        name="actions",
        topic=topic,
        kafka_bootstrap_servers=servers,
        message_format=JsonFormat(schema_json="time timestamp, user string, added bigint"),
        timestamp_field="time",
        watermark_delay_threshold=timedelta(minutes=5),
        batch_source=FileSource(
            path=f"{folder}/log/*.parquet",
            file_format=ParquetFormat(),
            timestamp_field="event_timestamp",
            created_timestamp_column="created_timestamp",
        ),
    )
    view = StreamFeatureView(
        name="activity",
        entities=[user],
        source=source,
        timestamp_field="time",
        aggregations=[
            Aggregation(column="added", function="count", name="ever"),
            Aggregation(column="added", function="sum", time_window=timedelta(hours=1), name="sum_1h"),
        ],
        tags={"millrace.changelog": f"{topic}.features"},
        schema=[
            Field(name="user", dtype=String),
            Field(name="ever", dtype=Int64),
            Field(name="sum_1h", dtype=Float64),
        ],
    )
    store = FeatureStore(repo_path=str(folder))
    store.apply([user, view])
    return store


def produce(servers: str, topic: str, numbers: range) -> None:
    """Event n adds n for user n % 5, n seconds after the start; a user keeps to a partition."""
    producer = KafkaProducer(bootstrap_servers=servers)
    for n in numbers:
        event = {"time": (START + timedelta(seconds=n)).isoformat(), "user": f"user {n % 5}", "added": n}
        partition = n % 5 % PARTITIONS
        producer.send(topic, key=event["user"].encode(), value=json.dumps(event).encode(), partition=partition)
    producer.flush()
    producer.close()


def expected(count: int) -> dict:
    return {f"user {k}": (len(range(k, count, 5)), float(sum(range(k, count, 5)))) for k in range(5)}


def online(store: FeatureStore) -> dict:
    read = store.get_online_features(
        features=["activity:ever", "activity:sum_1h"], entity_rows=[{"user": f"user {k}"} for k in range(5)]
    ).to_dict()
    return dict(zip(read["user"], zip(read["ever"], read["sum_1h"], strict=True), strict=True))


def logged(folder: Path) -> dict:
    rows = duckdb.sql(
        f"SELECT DISTINCT ON (user) user, ever, sum_1h FROM '{folder}/log/*.parquet'"
        " ORDER BY user, event_timestamp DESC, created_timestamp DESC"
    ).fetchall()
    return {user: (ever, added) for user, ever, added in rows}


def total(ingestion: Ingestion, figure: str) -> int:
    return sum(row[figure] for row in ingestion.status().values())


@pytest.fixture
def topic(kafka: str, tmp_path: Path) -> str:
    name = re.sub(r"\W", "-", tmp_path.name)
    ensure_topics(kafka, {name: PARTITIONS})
    return name


def test_an_ingestion_serves_features_and_the_next_goes_on_where_it_stopped(kafka, topic, tmp_path):
    store, home = applied(tmp_path / "repo", topic, kafka), tmp_path / "home"
    processor = MillraceStreamProcessor(fs=store, sfv=store.get_stream_feature_view("activity"), home=home)
    produce(kafka, topic, range(300))
    first = processor.ingest_stream_feature_view(PushMode.ONLINE)
    wait_for(lambda: online(store) == expected(300), "the first events")
    assert not first.wait(0.1)
    produce(kafka, topic, range(300, 400))
    first.stop()
    assert first.wait()
    produce(kafka, topic, range(400, 500))

    second = processor.ingest_stream_feature_view(to=PushMode.ONLINE)
    wait_for(lambda: online(store) == expected(500), "the last events")
    second.stop()
    assert total(first, "read") + total(second, "read") == total(second, "processed") == 500
    assert not (tmp_path / "repo" / "log").exists()
    assert committed(kafka, topic) == 500

    # The worker of the job goes on there as well.
    (plan,) = plans(store)
    worker = open_worker(store, plan, True, Settings(str(home), checkpoint_uri(home), 0.05, until_caught_up=True))
    worker.start(dict.fromkeys(range(PARTITIONS), 0))
    assert [row["read"] for row in worker.status().values()] == [0, 0]
    assert sum(row["processed"] for row in worker.status().values()) == 500
    worker.close()


def committed(servers: str, topic: str) -> int:
    """What the view's group has read, as Kafka's own tools see it."""
    consumer = KafkaConsumer(bootstrap_servers=servers, group_id="millrace-activity")
    found = sum(consumer.committed(TopicPartition(topic, number)) or 0 for number in range(PARTITIONS))
    consumer.close()
    return found


@pytest.mark.parametrize("to", [PushMode.OFFLINE, PushMode.ONLINE_AND_OFFLINE])
def test_the_push_mode_says_which_stores_are_written(kafka, topic, tmp_path, to):
    store = applied(tmp_path / "repo", topic, kafka)
    produce(kafka, topic, range(200))
    processor = MillraceStreamProcessor(store, store.get_stream_feature_view("activity"), tmp_path / "home")
    ingestion = processor.ingest_stream_feature_view(to)
    wait_for(lambda: total(ingestion, "processed") == 200, "all events")
    ingestion.stop()
    assert logged(tmp_path / "repo") == expected(200)
    nothing = dict.fromkeys(expected(200), (None, None))
    assert online(store) == (nothing if to == PushMode.OFFLINE else expected(200))
    assert bool(count_partitions(kafka, [f"{topic}.features"])) == (to != PushMode.OFFLINE)


def test_the_example_of_the_document_works_and_a_second_ingestion_ends_the_first(kafka, topic, tmp_path):
    (example,) = re.findall(
        r"```python\n([^`]*MillraceStreamProcessor.*?)```", (ROOT / "docs" / "features.md").read_text(), re.S
    )
    names: dict = {}
    exec(example, names)
    store = applied(tmp_path / "repo", topic, kafka)
    first = names["ingest"](tmp_path / "repo", "activity", tmp_path / "home")
    second = names["ingest"](tmp_path / "repo", "activity", tmp_path / "home")
    produce(kafka, topic, range(100))
    with pytest.raises(StaleEpochError, match="taken over"):
        first.wait(60)
    with pytest.raises(StaleEpochError):
        first.stop()
    wait_for(lambda: online(store) == expected(100), "all events")
    second.stop()
    assert logged(tmp_path / "repo") == expected(100)
