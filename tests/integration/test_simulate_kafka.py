"""What `millrace simulate` counts is what the broker holds."""

import json
from collections import Counter
from pathlib import Path

import orjson
import pytest
from kafka import KafkaConsumer, TopicPartition

from ops import simulate
from ops.environment import Environment
from streaming.events import EDITS


def everything(servers: str, topic: str) -> list[tuple[int, bytes, bytes]]:
    """(partition, key, value) of all messages of a topic."""
    consumer = KafkaConsumer(bootstrap_servers=servers, enable_auto_commit=False, auto_offset_reset="earliest")
    partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)]
    consumer.assign(partitions)
    ends = consumer.end_offsets(partitions)
    found: list[tuple[int, bytes, bytes]] = []
    while any(consumer.position(partition) < end for partition, end in ends.items()):
        for partition, records in consumer.poll(timeout_ms=5000).items():
            found += [(partition.partition, record.key, record.value) for record in records]
    consumer.close()
    return found


def test_counts_equal_what_kafka_holds_and_keys_keep_their_partition(
    kafka: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So little memory that the producer must wait for acknowledgements many times.
    monkeypatch.setattr("streaming.simulators.produce.IN_FLIGHT_BYTES", 50_000)
    environment = Environment(kafka, None, tmp_path, None, ())
    faults = ["--disorder", "0.2", "--duplicates", "0.1", "--late", "0.05", "--poison", "0.1", "--seed", "5"]
    command = ["wikipedia", "--limit", "3000", "--topic", "simulated", *faults]
    assert simulate.main(command, environment) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    counts = result["counts"]
    assert result["source"] == "generated"
    assert "generated edits" in output.err
    assert result["messages"] == sum(counts.values())
    assert counts["events"] + counts["late"] == 3000

    messages = everything(kafka, "simulated")
    assert len(messages) == result["messages"]
    assert len({partition for partition, _, _ in messages}) == EDITS.partitions
    assert max(Counter(key for key, _ in {(key, partition) for partition, key, _ in messages}).values()) == 1
    seen = Counter(value for _, _, value in messages)
    assert sum(count == 2 for count in seen.values()) >= counts["duplicates"]
    whole = [fields for value in seen if (fields := parsed(value)) is not None]
    assert len(whole) == 3000

    assert simulate.main([*command[:-2], "--seed", "6"], environment) == 0
    again = json.loads(capsys.readouterr().out)["messages"]
    assert len(everything(kafka, "simulated")) == result["messages"] + again


def parsed(value: bytes) -> dict[str, object] | None:
    """The event, or None where the value is poison."""
    try:
        fields: dict[str, object] = orjson.loads(value)
    except ValueError:
        return None
    good = "user" in fields and isinstance(fields["added"], int) and str(fields["time"]) < "2900"
    return fields if good else None
