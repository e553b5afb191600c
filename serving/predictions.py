"""The log of predictions: a background producer to the topic `predictions` that never slows a request.

kafka-python's producer does not bound its memory, and its `send` waits for metadata. So records wait in a bounded queue
of ours, and one thread sends them in rounds, each confirmed before the next: what is in memory is the queue and
one round. When the queue is full, or a round is not confirmed in time, records are dropped and counted.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import orjson
from kafka import KafkaAdminClient, KafkaProducer
from kafka.errors import TopicAlreadyExistsError

from streaming.events import PREDICTIONS

logger = logging.getLogger(__name__)

ROUND = 500
DELIVERY_S = 10.0
PAUSE_S = 5.0


class Producer(Protocol):
    """What is used of a `kafka.KafkaProducer`."""

    def send(self, topic: str, *, key: bytes, value: bytes) -> Any:
        """Start sending; the future's `get(timeout)` confirms."""

    def close(self, timeout: float | None = None) -> None:
        """End at once or after the time-out."""


def connect(bootstrap_servers: str) -> Producer:
    """A producer to a broker on which the topic exists.

    Raises:
        KafkaError: the broker does not answer within seconds.
    """
    admin = KafkaAdminClient(bootstrap_servers=bootstrap_servers, bootstrap_timeout_ms=5_000, request_timeout_ms=5_000)
    try:
        if PREDICTIONS.name not in admin.list_topics():
            admin.create_topics({PREDICTIONS.name: {"num_partitions": PREDICTIONS.partitions}})
    except TopicAlreadyExistsError:
        logger.debug("another process created the topic %s first", PREDICTIONS.name)
    finally:
        admin.close()
    producer: Producer = KafkaProducer(
        bootstrap_servers=bootstrap_servers,
        bootstrap_timeout_ms=5_000,
        max_block_ms=5_000,
        request_timeout_ms=5_000,
        delivery_timeout_ms=int(DELIVERY_S * 1e3),
        linger_ms=5,
    )
    return producer


class PredictionLog:
    """Publishes prediction records in the background.

    Args:
        open_producer: makes a connected producer; called again, after a pause, when it or a round of records failed.
        max_queue: records that may wait.
        on_published: told how many records were confirmed.
        on_dropped: told the reason (`queue_full`, `broker`, `record`) and how many were lost.
        pause_s: between two attempts to reach the broker.
    """

    def __init__(
        self,
        open_producer: Callable[[], Producer],
        *,
        max_queue: int,
        on_published: Callable[[int], None],
        on_dropped: Callable[[str, int], None],
        pause_s: float = PAUSE_S,
    ) -> None:
        self._open = open_producer
        self._queue: queue.Queue[Mapping[str, object]] = queue.Queue(max_queue)
        self._on_published = on_published
        self._on_dropped = on_dropped
        self._pause_s = pause_s
        self._producer: Producer | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="predictions", daemon=True)
        self._thread.start()

    def publish(self, record: Mapping[str, object]) -> None:
        """Queue a record (fields of `streaming.events.PREDICTIONS`); returns at once, drops when it is full."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._on_dropped("queue_full", 1)

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is queued, for at most `timeout_s`."""
        self._closing.set()
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while not (self._closing.is_set() and self._queue.empty()):
            records = self._round()
            if records and not self._deliver(records) and self._closing.wait(self._pause_s):
                self._on_dropped("broker", self._queue.qsize())
                return
        if self._producer is not None:
            self._producer.close(timeout=DELIVERY_S)

    def _round(self) -> list[Mapping[str, object]]:
        """Up to `ROUND` records; empty when none came for a moment, so that a close is noticed."""
        records: list[Mapping[str, object]] = []
        try:
            records.append(self._queue.get(timeout=0.2))
            while len(records) < ROUND:
                records.append(self._queue.get_nowait())
        except queue.Empty:
            pass
        return records

    def _deliver(self, records: list[Mapping[str, object]]) -> bool:
        """Send a round and wait until the broker has it; whether it has all of it."""
        messages = self._encoded(records)
        published = 0
        try:
            self._producer = self._producer or self._open()
            sent = [self._producer.send(PREDICTIONS.name, key=key, value=value) for key, value in messages]
            deadline = time.monotonic() + DELIVERY_S
            for confirmation in sent:
                confirmation.get(timeout=max(0.0, deadline - time.monotonic()))
                published += 1
        except Exception as error:
            lost = len(messages) - published
            logger.warning("%d predictions lost, the broker does not take them: %s", lost, error)
            self._on_dropped("broker", lost)
            if self._producer is not None:
                self._producer.close(timeout=0)
            self._producer = None
            return False
        finally:
            self._on_published(published)
        return True

    def _encoded(self, records: list[Mapping[str, object]]) -> list[tuple[bytes, bytes]]:
        messages = []
        for record in records:
            try:
                messages.append((str(record["id"]).encode(), orjson.dumps(record)))
            except TypeError as error:
                logger.warning("a prediction is no JSON: %s", error)
                self._on_dropped("record", 1)
        return messages
