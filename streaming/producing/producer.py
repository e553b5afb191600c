"""How the stream sends its own messages, such as rejects: it waits for the broker, and gives up in time."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from kafka import KafkaProducer

TIMEOUT_MS = 20_000


class Message(NamedTuple):
    """What is sent to a topic."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()


def connect(bootstrap_servers: str, **options: Any) -> KafkaProducer:
    """A producer whose calls end in time.

    Args:
        bootstrap_servers: `host:port,host:port`.
        options: of KafkaProducer, besides.

    Raises:
        KafkaError: no broker answered.
    """
    return KafkaProducer(
        bootstrap_servers=bootstrap_servers.split(","),
        delivery_timeout_ms=TIMEOUT_MS,
        request_timeout_ms=TIMEOUT_MS // 2,
        max_block_ms=TIMEOUT_MS,
        reconnect_backoff_max_ms=1_000,
        **options,
    )


def send(producer: KafkaProducer, messages: Iterable[Message]) -> None:
    """Send them in order and wait until the broker has all.

    Raises:
        KafkaError: it did not take them in time; it may have some.
    """
    sent = [producer.send(each.topic, key=each.key, value=each.value, headers=list(each.headers)) for each in messages]
    producer.flush(timeout=TIMEOUT_MS / 1000)
    for future in sent:
        future.get(timeout=0)
