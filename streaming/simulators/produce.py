"""Send arrivals to Kafka as fast as they come, in bounded memory, and account for each of them."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from kafka import KafkaAdminClient, KafkaProducer
from kafka.errors import KafkaError, TopicAlreadyExistsError
from kafka.partitioner.default import murmur2
from kafka.producer.future import FutureRecordMetadata

from streaming.simulators.arrival import Arrival

IN_FLIGHT_BYTES = 32 * 2**20
"""Keys and values not yet acknowledged; kafka-python itself would buffer without a limit."""
DELIVERY_S = 60.0
CONNECT_S = 10.0
PROGRESS_S = 2.0


class ProduceError(ValueError):
    """The broker can't be reached or refuses, in one sentence."""


@dataclass(frozen=True)
class Report:
    """What was acknowledged by the broker."""

    counts: Mapping[str, int]
    """Kind of arrival -> how many."""
    messages: int
    seconds: float

    @property
    def messages_per_s(self) -> float:
        """Acknowledged messages a second, with the time it took to make them."""
        return self.messages / self.seconds if self.seconds else 0.0


def ensure_topic(bootstrap_servers: str, topic: str, partitions: int) -> None:
    """Create the topic unless it is there already (then with as many partitions as it has).

    Raises:
        ProduceError: no broker answers there, or it refuses.
    """
    try:
        admin = KafkaAdminClient(bootstrap_servers=bootstrap_servers, bootstrap_timeout_ms=int(CONNECT_S * 1000))
        try:
            admin.create_topics({topic: {"num_partitions": partitions}}, wait_for_metadata=True)
        except TopicAlreadyExistsError:
            pass
        finally:
            admin.close()
    except (KafkaError, OSError, ValueError) as error:
        raise ProduceError(_unreachable(bootstrap_servers, topic, error)) from None


def produce(
    arrivals: Iterable[Arrival],
    bootstrap_servers: str,
    topic: str,
    progress: Callable[[int, float], None] = lambda messages, seconds: None,
) -> Report:
    """Send all arrivals to an existing topic, each to its key's partition, and wait until all are acknowledged.

    Keys go to the partition that every Kafka client chooses for them by default. `progress` is called every few
    seconds with the number of messages sent and the seconds since the start.

    Raises:
        ProduceError: no broker answers there, or a message was not acknowledged; what was sent before it stays sent.
    """
    try:
        producer = KafkaProducer(
            bootstrap_servers=bootstrap_servers,
            compression_type="lz4",
            linger_ms=20,
            batch_size=256 * 1024,
            bootstrap_timeout_ms=int(CONNECT_S * 1000),
            max_block_ms=int(CONNECT_S * 1000),
            delivery_timeout_ms=int(DELIVERY_S * 1000),
        )
        try:
            return _send(arrivals, producer, topic, progress)
        finally:
            producer.close(timeout=CONNECT_S)
    except (KafkaError, OSError) as error:
        raise ProduceError(_unreachable(bootstrap_servers, topic, error)) from None


def _send(
    arrivals: Iterable[Arrival], producer: KafkaProducer, topic: str, progress: Callable[[int, float], None]
) -> Report:
    partitions = sorted(producer.partitions_for(topic) or ())
    if not partitions:
        raise ProduceError(f"Topic {topic} does not exist: create it first.")
    partition_of: dict[bytes, int] = {}
    counts: Counter[str] = Counter()
    in_flight: deque[tuple[FutureRecordMetadata, int]] = deque()
    in_flight_bytes = 0
    start_s = reported_s = time.monotonic()
    messages = 0
    for messages, (_, kind, key, value) in enumerate(arrivals, start=1):
        partition = partition_of.get(key)
        if partition is None:
            partition = partition_of[key] = partitions[(murmur2(key) & 0x7FFFFFFF) % len(partitions)]
        in_flight.append((producer.send(topic, value=value, key=key, partition=partition), len(key) + len(value)))
        in_flight_bytes += len(key) + len(value)
        counts[kind.value] += 1
        while in_flight_bytes > IN_FLIGHT_BYTES:
            future, size = in_flight.popleft()
            future.get(timeout=DELIVERY_S)
            in_flight_bytes -= size
        if messages % 1000 == 0 and time.monotonic() - reported_s > PROGRESS_S:
            reported_s = time.monotonic()
            progress(messages, reported_s - start_s)
    producer.flush(timeout=DELIVERY_S)
    for future, _ in in_flight:
        future.get(timeout=DELIVERY_S)
    return Report(counts=dict(counts), messages=messages, seconds=time.monotonic() - start_s)


def _unreachable(bootstrap_servers: str, topic: str, error: Exception) -> str:
    return (
        f"Kafka at {bootstrap_servers} does not take messages for topic {topic} ({type(error).__name__}): "
        "start it with `millrace up`, or correct KAFKA_BOOTSTRAP_SERVERS."
    )
