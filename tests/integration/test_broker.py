"""The real broker: it serves, survives SIGKILL with its data, and says clearly why it cannot start."""

import os
import signal
import socket
import threading
from pathlib import Path

import pytest
from kafka import KafkaConsumer, KafkaProducer

from ops.broker import Broker, BrokerError, answers
from ops.ports import LOOPBACK, free_ports, is_listening
from ops.process import ProcessError


@pytest.fixture
def broker(tmp_path: Path) -> Broker:
    port, controller_port = free_ports(2)
    return Broker(tmp_path / "data", tmp_path / "kafka.log", port, controller_port)


def produce(broker: Broker, count: int) -> None:
    from kafka import KafkaAdminClient
    from kafka.admin import NewTopic

    admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    admin.create_topics([NewTopic("events", 1, 1)])
    admin.close()
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers)
    sent = [producer.send("events", str(number).encode()) for number in range(count)]
    for one in sent:
        one.get(timeout=60)
    producer.close()


def consume(broker: Broker, count: int) -> list[bytes]:
    consumer = KafkaConsumer(
        "events", bootstrap_servers=broker.bootstrap_servers, auto_offset_reset="earliest", consumer_timeout_ms=60_000
    )
    values = [record.value for _, record in zip(range(count), consumer, strict=False)]
    consumer.close()
    return values


def test_acknowledged_records_survive_sigkill_and_a_move_to_other_ports(broker: Broker) -> None:
    killed = broker.start()
    try:
        produce(broker, 100)
        os.kill(killed.pid, signal.SIGKILL)
        killed.stop()  # nothing is left to end; it returns when the kernel has given the ports back
        moved = Broker(broker.data, broker.log, *free_ports(2))
        moved.start()
        try:
            assert consume(moved, 100) == [str(number).encode() for number in range(100)]
        finally:
            moved.stop()
        assert not is_listening(moved.port)
        assert not answers(moved.bootstrap_servers)
    finally:
        broker.stop()


def test_a_taken_port_is_named_before_anything_starts(broker: Broker) -> None:
    with socket.create_server((LOOPBACK, broker.port)):
        with pytest.raises(BrokerError, match=rf"port {broker.port} of the broker is taken by .*pid {os.getpid()}"):
            broker.start()
    assert not broker.data.exists()


def test_a_broker_that_dies_shows_the_end_of_its_log(broker: Broker) -> None:
    broker.data.mkdir()
    (broker.data / "logs").mkdir()
    (broker.data / "logs" / "meta.properties").write_text("version=1\ncluster.id=x\nnode.id=2\n")  # another node's data
    with pytest.raises(ProcessError, match=r"(?s)the broker ended while starting; the end of .*kafka\.log.*node"):
        broker.start()
    assert not is_listening(broker.port)


def test_two_threads_share_one_answer(kafka: str) -> None:
    """The status command asks all parts at once; kafka-python's clients must not get into each other's way."""
    found: list[bool] = []
    threads = [threading.Thread(target=lambda: found.append(answers(kafka))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [True, True]
