"""The changelog over a real broker: a compacted topic, one record an entity and flush, errors that can be retried."""

import json

import numpy as np
import pyarrow as pa
import pytest
from kafka import KafkaAdminClient, KafkaConsumer
from kafka.admin import ConfigResource
from kafka.errors import KafkaError

from ops.ports import free_ports
from streaming import changelog
from streaming.changelog import ChangelogSink, records
from streaming.control import DriftLog
from streaming.records import Drift, Emission

AT_US = 1_700_000_000_000_001


def emission(entities: list, times_us: list[int], edits: list[int]) -> Emission:
    mean = pa.array([None if edit % 2 else float("nan") if edit == 4 else edit / 4 for edit in edits], pa.float64())
    columns = {"edits": edits, "mean": mean, "top": pa.array([["a"] * edit for edit in edits], pa.list_(pa.string()))}
    return Emission(pa.array(entities), np.array(times_us, dtype=np.int64), pa.table(columns))


def consumed(servers: str, topic: str, count: int) -> list[tuple[str, dict]]:
    consumer = KafkaConsumer(topic, bootstrap_servers=servers, auto_offset_reset="earliest", consumer_timeout_ms=20_000)
    found = []
    for record in consumer:
        found.append((record.key.decode(), json.loads(record.value)))
        if len(found) == count:
            break
    consumer.close()
    return found


def test_each_flush_publishes_the_newest_row_of_each_entity(kafka, monkeypatch):
    monkeypatch.setattr(changelog, "CHUNK", 2)
    sink = ChangelogSink(kafka, "activity.features")
    assert sink.write([]) == 0
    first = emission(["ann", "böb", "ann"], [AT_US, AT_US, AT_US + 1], [1, 2, 3])
    assert sink.write([first, emission(["cee"], [AT_US], [4])]) == 3
    sink.close()
    assert sink.write([emission(["ann"], [AT_US + 2], [5])]) == 1
    sink.close()
    found = consumed(kafka, "activity.features", 4)
    assert {key for key, _ in found} == {"ann", "böb", "cee"}
    ann = [value for key, value in found if key == "ann"]
    assert [value["features"]["edits"] for value in ann] == [3, 5]
    assert ann[0]["revision"] < ann[1]["revision"]
    assert (ann[0]["entity"], ann[0]["event_time"]) == ("ann", "2023-11-14T22:13:20.000002+00:00")
    assert dict(found)["cee"]["features"] == {"edits": 4, "mean": None, "top": ["a"] * 4}
    admin = KafkaAdminClient(bootstrap_servers=kafka)
    (configs,) = admin.describe_configs([ConfigResource("topic", "activity.features")])["topic"].values()
    admin.close()
    assert configs["cleanup.policy"]["value"] == "compact"


def test_drifts_reach_the_topic_control(kafka):
    drifts = DriftLog(kafka, "activity")
    drifts.write([])
    drifts.write([Drift("drift", 1, 41, AT_US, "the mean of added has changed to 3 (40 events)")])
    drifts.close()
    ((key, event),) = consumed(kafka, "control", 1)
    assert key == event["model"] == "activity.drift"
    assert (event["action"], event["partition"], event["offset"]) == ("drift", 1, 41)
    assert event["time"] == "2023-11-14T22:13:20.000001Z"


def test_a_broker_that_is_away_is_an_error_to_try_again(monkeypatch):
    (port,) = free_ports(1)
    monkeypatch.setattr("streaming.producing.producer.TIMEOUT_MS", 1_000)
    sink = ChangelogSink(f"127.0.0.1:{port}", "activity.features")
    with pytest.raises(KafkaError):
        sink.write([emission(["ann"], [AT_US], [1])])


def test_integer_entities_keep_their_type_in_the_value():
    keys, values = records(emission([7, -1], [AT_US, 0], [0, 1]), 5)
    assert keys == [b"7", b"-1"]
    assert [json.loads(value)["entity"] for value in values] == [7, -1]
    assert json.loads(values[1]) == {
        "entity": -1,
        "event_time": "1970-01-01T00:00:00+00:00",
        "revision": 5,
        "features": {"edits": 1, "mean": None, "top": ["a"]},
    }
