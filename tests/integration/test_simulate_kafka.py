"""What `millrace simulate` counts is what the broker holds."""

import json
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import orjson
import pyarrow as pa
import pytest
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition

from ops import simulate
from ops.broker import Broker
from ops.environment import Environment
from ops.ports import free_ports
from streaming.events import EDITS
from streaming.producing.columns import from_rows, rows
from streaming.simulators import bulk
from streaming.simulators.arrival import Arrivals, Faults, disturb, paced
from streaming.simulators.produce import ProduceError, ensure_topic, produce, produce_batches


def everything(servers: str, topic: str) -> list[tuple[int, bytes, bytes]]:
    """(partition, key, value) of all messages of a topic."""
    consumer = KafkaConsumer(bootstrap_servers=servers, enable_auto_commit=False, auto_offset_reset="earliest")
    partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)]
    consumer.assign(partitions)
    ends = consumer.end_offsets(partitions)
    found: list[tuple[int, bytes, bytes]] = []
    while any(consumer.position(partition) < end for partition, end in ends.items()):
        for partition, records in consumer.poll(timeout_ms=5000, max_records=20_000).items():
            found += [(partition.partition, record.key, record.value) for record in records]
    consumer.close()
    return found


@pytest.mark.parametrize("versions", [("3.0.",), ("none that was tried",)], ids=["ready batches", "public producer"])
def test_counts_equal_what_kafka_holds_and_keys_keep_their_partition(
    kafka: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    versions: tuple[str],
) -> None:
    # So little memory that the producer must wait for acknowledgements many times.
    monkeypatch.setattr("streaming.simulators.produce.IN_FLIGHT_BYTES", 50_000)
    monkeypatch.setattr("streaming.producing.delivery.TRIED_VERSIONS", versions)
    environment = Environment(kafka, None, tmp_path, None, ())
    topic = f"simulated-{len(versions[0])}"
    faults = ["--disorder", "0.2", "--duplicates", "0.1", "--late", "0.05", "--poison", "0.1", "--seed", "5"]
    command = ["wikipedia", "--limit", "3000", "--topic", topic, *faults]
    assert simulate.main(command, environment) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    counts = result["counts"]
    assert result["source"] == "generated"
    assert "generated edits" in output.err
    assert result["messages"] == sum(counts.values())
    assert counts["events"] + counts["late"] == 3000

    messages = everything(kafka, topic)
    assert len(messages) == result["messages"]
    assert len({partition for partition, _, _ in messages}) == EDITS.partitions
    assert max(Counter(key for key, _ in {(key, partition) for partition, key, _ in messages}).values()) == 1
    seen = Counter(value for _, _, value in messages)
    assert sum(count == 2 for count in seen.values()) >= counts["duplicates"]
    whole = [fields for value in seen if (fields := parsed(value)) is not None]
    assert len(whole) == 3000

    assert simulate.main([*command[:-2], "--seed", "6"], environment) == 0
    again = json.loads(capsys.readouterr().out)["messages"]
    assert len(everything(kafka, topic)) == result["messages"] + again


def parsed(value: bytes) -> dict[str, object] | None:
    """The event, or None where the value is poison."""
    try:
        fields: dict[str, object] = orjson.loads(value)
    except ValueError:
        return None
    good = "user" in fields and isinstance(fields["added"], int) and str(fields["time"]) < "2900"
    return fields if good else None


def test_both_ways_put_the_same_records_in_the_same_places(kafka: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for topic, versions in (("ready", ("3.0.",)), ("public", ())):
        monkeypatch.setattr("streaming.producing.delivery.TRIED_VERSIONS", versions)
        ensure_topic(kafka, topic, 5)
        produce(disturb(bulk.events(4000, keys=300, skew=1.0), Faults(disorder=0.1)), kafka, topic)
    ready, public = everything(kafka, "ready"), everything(kafka, "public")
    for partition in range(5):
        assert [row for row in ready if row[0] == partition] == [row for row in public if row[0] == partition]


def test_predictions_and_labels_go_to_their_topics(
    kafka: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predictions", "--limit", "2000", "--speed-up", "100000"]
    assert simulate.main(command, Environment(kafka, None, tmp_path, None, ())) == 0
    result = json.loads(capsys.readouterr().out)
    made, labels = everything(kafka, "predictions"), everything(kafka, "labels")
    assert len(made) == 2000
    assert len(made) + len(labels) == result["messages"]
    assert {key for _, key, _ in labels} < {key for _, key, _ in made}


def test_a_batch_that_is_too_large_for_the_topic_is_cut_and_delivered(kafka: str) -> None:
    admin = KafkaAdminClient(bootstrap_servers=kafka)
    admin.create_topics({"small": {"num_partitions": 1, "configs": {"max.message.bytes": "20000"}}})
    admin.close()
    report = produce(disturb(bulk.events(2000, keys=10), Faults()), kafka, "small", compression="none")
    sequence = [orjson.loads(value)["seq"] for _, _, value in everything(kafka, "small")]
    assert report.messages == 2000
    assert sequence == list(range(2000))


def test_a_record_that_no_batch_can_hold_is_one_sentence(kafka: str) -> None:
    ensure_topic(kafka, "narrow", 1)
    events = from_rows([0], [b"k"], [random.Random(0).randbytes(2_000_000)])
    with pytest.raises(ProduceError, match="A record is larger than topic narrow takes"):
        produce(disturb([events], Faults()), kafka, "narrow")


def test_packed_messages_hold_all_events(kafka: str) -> None:
    ensure_topic(kafka, "packed", 3)
    report = produce_batches(bulk.messages(5000, keys=100, partitions=3), kafka, "packed")
    messages = everything(kafka, "packed")
    assert len(messages) == report.messages
    tables = [pa.ipc.open_stream(value).read_all() for _, _, value in messages]
    assert sorted(seq for table in tables for seq in table["seq"].to_pylist()) == list(range(5000))


def test_a_broker_that_dies_meanwhile_loses_and_doubles_nothing(tmp_path: Path) -> None:
    port, controller_port = free_ports(2)
    broker = Broker(tmp_path / "data", log=tmp_path / "kafka.log", port=port, controller_port=controller_port)
    first = broker.start()
    count = 30_000
    outcome: list[object] = []
    under_way = threading.Event()

    def arrivals() -> Iterator[Arrivals]:
        sent = 0
        for some in paced(disturb(bulk.events(count, keys=500), Faults()), rate=15_000):
            yield some
            sent += len(some)
            if sent > count // 4:
                under_way.set()

    def send() -> None:
        try:
            outcome.append(produce(arrivals(), broker.bootstrap_servers, "edits"))
        except ValueError as error:
            outcome.append(error)

    try:
        ensure_topic(broker.bootstrap_servers, "edits", 2)
        sender = threading.Thread(target=send)
        sender.start()
        assert under_way.wait(60)
        os.kill(first.pid, signal.SIGKILL)
        first.stop()  # returns when the kernel has given the ports back
        broker.start()
        sender.join(90)
        assert [getattr(report, "messages", report) for report in outcome] == [count]
        messages = everything(broker.bootstrap_servers, "edits")
        assert sorted(value for _, _, value in messages) == sorted(e.value for e in rows(bulk.events(count, keys=500)))
        for partition in (0, 1):
            sequence = [orjson.loads(value)["seq"] for at, _, value in messages if at == partition]
            assert sequence == sorted(sequence)
    finally:
        broker.stop()
