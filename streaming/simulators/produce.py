"""Send arrivals to Kafka as fast as they come, in bounded memory, and account for each of them."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from kafka import KafkaProducer
from kafka.errors import KafkaError, MessageSizeTooLargeError
from kafka.producer.future import FutureRecordMetadata

from streaming.producing.delivery import Delivery, deliver, takes_batches
from streaming.producing.encode import BATCH_BYTES, Batch, Compression, encode
from streaming.simulators.arrival import KINDS, Arrivals
from streaming.topics import ensure_topics

IN_FLIGHT_BYTES = 32 * 2**20
"""Keys and values not yet acknowledged; kafka-python itself would buffer without a limit."""
DELIVERY_S = 60.0
CONNECT_S = 10.0
PROGRESS_S = 2.0


class ProduceError(ValueError):
    """The broker can't be reached or refuses, in one sentence."""


@dataclass(frozen=True)
class Report:
    """What was acknowledged by the broker, and where the time went.

    Attributes:
        counts: Kind of arrival -> how many.
        messages: All of them.
        seconds: From the first to the last acknowledgement, making them included.
        made_s: Spent in making and disturbing events, and in waiting for their time.
        encoded_s: Spent in encoding them.
        waited_s: Spent in waiting for the broker.
    """

    counts: Mapping[str, int]
    messages: int
    seconds: float
    made_s: float = 0.0
    encoded_s: float = 0.0
    waited_s: float = 0.0

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
        ensure_topics(bootstrap_servers, {topic: partitions})
    except (KafkaError, OSError, ValueError) as error:
        raise ProduceError(_unreachable(bootstrap_servers, topic, error)) from None


def produce(
    chunks: Iterable[Arrivals],
    bootstrap_servers: str,
    topics: str | Sequence[str],
    progress: Callable[[int, float], None] = lambda messages, seconds: None,
    compression: Compression = "lz4",
    batch_bytes: int = BATCH_BYTES,
) -> Report:
    """Send all arrivals to existing topics, each to its key's partition, and wait until all are acknowledged.

    Keys go to the partition that every Kafka client chooses for them by default; the order of arrivals is kept within
    a partition, and a retry stores nothing twice.

    Args:
        chunks: what to send.
        bootstrap_servers: `host:port,host:port`.
        topics: the topic of each route; one name where there is one.
        progress: called every few seconds with the number of messages sent and the seconds since the start.
        compression: of the record batches.
        batch_bytes: the most of a batch before compression.

    Raises:
        ProduceError: no broker answers there, or a message was not acknowledged; what was sent before it stays sent.
    """
    names = [topics] if isinstance(topics, str) else list(topics)
    with _Sender(bootstrap_servers, names, compression, batch_bytes) as sender:
        return _account(chunks, sender, progress)


def produce_batches(batches: Iterable[Batch], bootstrap_servers: str, topic: str) -> Report:
    """Send batches that are encoded already, such as packed ones, to an existing topic, as `produce` does.

    Raises:
        ProduceError: no broker answers there, it did not acknowledge a batch, or kafka-python is a version that was
            not tried with ready batches.
    """
    start_s = time.monotonic()
    messages = 0
    with _Sender(bootstrap_servers, [topic], "none", BATCH_BYTES) as sender:
        if not takes_batches():
            raise ProduceError("This version of kafka-python was not tried with ready batches: install 3.0.12.")
        for batch in batches:
            sender.queue(batch)
            messages += batch.records
        sender.finish()
    return Report({KINDS[0].value: messages}, messages, time.monotonic() - start_s, waited_s=sender.waited_s)


def _account(chunks: Iterable[Arrivals], sender: "_Sender", progress: Callable[[int, float], None]) -> Report:
    counts = np.zeros(len(KINDS), dtype=np.int64)
    start_s = reported_s = time.monotonic()
    made_s = 0.0
    source: Iterator[Arrivals] = iter(chunks)
    while True:
        asked_s = time.monotonic()
        arrivals = next(source, None)
        made_s += time.monotonic() - asked_s
        if arrivals is None:
            break
        sender.send(arrivals)
        counts += np.bincount(arrivals.kinds, minlength=len(KINDS))
        if time.monotonic() - reported_s > PROGRESS_S:
            reported_s = time.monotonic()
            progress(int(counts.sum()), reported_s - start_s)
    sender.finish()
    return Report(
        counts={kind.value: count for kind, count in zip(KINDS, counts.tolist(), strict=True) if count},
        messages=int(counts.sum()),
        seconds=time.monotonic() - start_s,
        made_s=made_s,
        encoded_s=sender.encoded_s,
        waited_s=sender.waited_s,
    )


class _Sender:
    """A producer, and what it has not been told of yet; a context in which Kafka's errors become one sentence."""

    def __init__(self, servers: str, topics: Sequence[str], compression: Compression, batch_bytes: int) -> None:
        self._servers, self._topics = servers, topics
        self._compression, self._batch_bytes = compression, batch_bytes
        self._in_flight: deque[tuple[Delivery | FutureRecordMetadata, int]] = deque()
        self._in_flight_bytes = 0
        self.encoded_s = self.waited_s = 0.0

    def __enter__(self) -> "_Sender":
        try:
            self._producer = KafkaProducer(
                bootstrap_servers=self._servers,
                compression_type=None if self._compression == "none" else self._compression,
                linger_ms=20,
                batch_size=self._batch_bytes,
                max_request_size=8 * BATCH_BYTES,
                bootstrap_timeout_ms=int(CONNECT_S * 1000),
                max_block_ms=int(CONNECT_S * 1000),
                reconnect_backoff_max_ms=1_000,
                delivery_timeout_ms=int(DELIVERY_S * 1000),
            )
        except (KafkaError, OSError) as error:
            raise ProduceError(_unreachable(self._servers, ", ".join(self._topics), error)) from None
        try:
            self._partitions = [self._partitions_of(topic) for topic in self._topics]
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._producer.close(timeout=CONNECT_S)
        if isinstance(error, KafkaError | OSError):
            raise ProduceError(_unreachable(self._servers, ", ".join(self._topics), error)) from None

    def send(self, arrivals: Arrivals) -> None:
        """Queue all arrivals; waits while too much of what was queued before is not acknowledged."""
        if takes_batches():
            start_s, waited_s = time.monotonic(), self.waited_s
            for batch in encode(arrivals.events, self._partitions, self._compression, self._batch_bytes):
                self.queue(batch)
            self.encoded_s += time.monotonic() - start_s - (self.waited_s - waited_s)
            return
        routes = arrivals.events.routes.tolist()
        for route, (_, _, (_, key, value)) in zip(routes, arrivals.rows(), strict=True):
            topic = self._topics[route]
            self._remember(self._producer.send(topic, value=value, key=key), len(key) + len(value))

    def queue(self, batch: Batch) -> None:
        """Queue one batch, and wait as `send` does."""
        self._remember(deliver(self._producer, self._topics[batch.route], batch), batch.raw_bytes)

    def finish(self) -> None:
        """Wait until everything is acknowledged."""
        if not takes_batches():  # ready batches linger for nothing, and one that was cut is never done for `flush`
            self._producer.flush(timeout=DELIVERY_S)
        self._settle(0)

    def _partitions_of(self, topic: str) -> int:
        partitions = self._producer.partitions_for(topic)
        if not partitions:
            raise ProduceError(f"Topic {topic} does not exist: create it first.")
        return len(partitions)

    def _remember(self, delivery: Delivery | FutureRecordMetadata, size: int) -> None:
        self._in_flight.append((delivery, size))
        self._in_flight_bytes += size
        if self._in_flight_bytes > IN_FLIGHT_BYTES:
            self._settle(IN_FLIGHT_BYTES)

    def _settle(self, limit: int) -> None:
        """Wait for the oldest until at most `limit` bytes are in flight."""
        start_s = time.monotonic()
        while self._in_flight and (self._in_flight_bytes > limit or limit == 0):
            delivery, size = self._in_flight.popleft()
            if isinstance(delivery, Delivery):
                delivery.wait(DELIVERY_S)
            else:
                delivery.get(timeout=DELIVERY_S)
            self._in_flight_bytes -= size
        self.waited_s += time.monotonic() - start_s


def _unreachable(bootstrap_servers: str, topic: str, error: BaseException) -> str:
    if isinstance(error, MessageSizeTooLargeError):
        return f"A record is larger than topic {topic} takes: raise its max.message.bytes, or leave the record out."
    return (
        f"Kafka at {bootstrap_servers} does not take messages for topic {topic} ({type(error).__name__}): "
        "start it with `millrace up`, or correct KAFKA_BOOTSTRAP_SERVERS."
    )
