"""The changelog of a view's features: every flushed row in a compacted Kafka topic, for readers other than Feast.

The key of a record is the entity as text; its value is JSON: `{"entity": "ann", "event_time":
"2026-01-02T03:04:05.000006+00:00", "revision": 1767323045000007, "features": {"count_added_1h": 3, ...}}`. `revision`
is the wall clock (UTC microseconds) at which the row was published. A flush publishes the newest row of each entity.
After a crash rows since the last checkpoint are published again, so a reader that must never step back keeps the record
with the greatest (event_time, revision) of each key.
"""

import time
from collections.abc import Sequence
from datetime import timedelta

import orjson
from kafka import KafkaProducer
from kafka.errors import KafkaError

from streaming.producing.producer import Message, connect, send
from streaming.records import Emission
from streaming.sinks import OnlineSink, latest
from streaming.sqlite_store import EPOCH
from streaming.topics import ensure_topics

CHUNK = 5_000
DEFAULT_PARTITIONS = -1  # the broker's own number


class Published:
    """An online sink whose rows are published as well, after they were written.

    Args:
        online: The sink.
        changelog: Where they are published.
    """

    def __init__(self, online: OnlineSink, changelog: "ChangelogSink") -> None:
        self._online, self._changelog = online, changelog

    def write(self, emissions: list[Emission]) -> int:
        """Write, then publish; what fails is to be written and published again, which changes nothing."""
        written = self._online.write(emissions)
        self._changelog.write(emissions)
        return written

    def sync(self) -> None:
        """Make what was written durable."""
        self._online.sync()


class ChangelogSink:
    """Publishes feature rows to a topic, which it creates with `cleanup.policy=compact` where it does not exist.

    Args:
        bootstrap_servers: `host:port,host:port`.
        topic: `<view>.features` by convention; named by the view's tag `millrace.changelog`.
    """

    def __init__(self, bootstrap_servers: str, topic: str) -> None:
        self._servers, self._topic = bootstrap_servers, topic
        self._producer: KafkaProducer | None = None

    def write(self, emissions: Sequence[Emission]) -> int:
        """Publish the newest row of each entity and wait until the broker has them; returns the number of entities.

        Args:
            emissions: in the order in which they were made.

        Raises:
            KafkaError: the broker did not take them in time; publishing the same emissions again is safe.
        """
        newest = latest(emissions)
        if newest is None:
            return 0
        try:
            self._publish(newest)
        except KafkaError:  # an idempotent producer may be of no use after some of them
            self.close()
            raise
        return len(newest.entities)

    def close(self) -> None:
        """Leave the broker; the next `write` connects again."""
        if self._producer is not None:
            self._producer.close(timeout=2)
            self._producer = None

    def _publish(self, newest: Emission) -> None:
        if self._producer is None:
            self._producer = self._connect()
        revision = time.time_ns() // 1_000
        for start in range(0, len(newest.entities), CHUNK):
            part = slice(start, start + CHUNK)
            cells = newest.features.slice(start, CHUNK)
            keys, values = records(Emission(newest.entities[part], newest.event_time_us[part], cells), revision)
            send(self._producer, [Message(self._topic, key, value) for key, value in zip(keys, values, strict=True)])

    def _connect(self) -> KafkaProducer:
        ensure_topics(self._servers, {self._topic: DEFAULT_PARTITIONS}, {"cleanup.policy": "compact"})
        return connect(self._servers, enable_idempotence=True, compression_type="lz4", linger_ms=5)


def records(emission: Emission, revision: int) -> tuple[list[bytes], list[bytes]]:
    """Keys and values of the records of an emission; what JSON has no number for (NaN, infinities) is null."""
    entities = emission.entities.to_pylist()
    times = {
        at_us: (EPOCH + timedelta(microseconds=at_us)).isoformat() for at_us in set(emission.event_time_us.tolist())
    }
    values = [
        orjson.dumps({"entity": entity, "event_time": times[at_us], "revision": revision, "features": features})
        for entity, at_us, features in zip(
            entities, emission.event_time_us.tolist(), emission.features.to_pylist(), strict=True
        )
    ]
    return [str(entity).encode() for entity in entities], values
