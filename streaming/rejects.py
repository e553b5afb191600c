"""Records that changed no feature, kept for inspection and repair in `<topic>.dead` and `<topic>.late`.

A reject keeps its key and value and carries the headers `reason`, `view`, `partition` and `offset` (of the source
topic, decimal text); one with neither key nor value gets an empty value, because a producer needs one of them. After a
crash the records since the last checkpoint are read again, so one reject can be written twice: a reader keeps the first
of each (view, partition, offset).
"""

from collections.abc import Sequence

from kafka import KafkaProducer

from streaming import events
from streaming.producing.producer import Message, connect, send
from streaming.records import Reject

CHUNK = 1_000


class RejectLog:
    """The dead-letter and late topics of one view.

    Args:
        bootstrap_servers: `host:port,host:port`.
        topic: the source topic; `<topic>.dead` and `<topic>.late` must exist.
        view: name of the view that refused the records.
    """

    def __init__(self, bootstrap_servers: str, topic: str, view: str) -> None:
        self._topics = {"dead": events.dead(topic), "late": events.late(topic)}
        self._view = view.encode()
        self._servers = bootstrap_servers
        self._producer: KafkaProducer | None = None

    def write(self, rejects: Sequence[Reject]) -> None:
        """Write the rejects and wait until the broker has them, a thousand at a time so that memory stays bounded.

        Raises:
            KafkaError: the broker did not take them in time; writing the same rejects again is safe.
        """
        if not rejects:
            return
        if self._producer is None:
            self._producer = connect(self._servers, linger_ms=5)
        for start in range(0, len(rejects), CHUNK):
            send(self._producer, [self._message(reject) for reject in rejects[start : start + CHUNK]])

    def close(self) -> None:
        """Leave the broker."""
        if self._producer is not None:
            self._producer.close(timeout=2)

    def _message(self, reject: Reject) -> Message:
        headers = [
            ("reason", reject.reason.encode()),
            ("view", self._view),
            ("partition", str(reject.partition).encode()),
            ("offset", str(reject.offset).encode()),
        ]
        value = b"" if reject.key is reject.value is None else reject.value
        return Message(self._topics[reject.kind], reject.key, value, headers)


def identity(headers: Sequence[tuple[str, bytes]]) -> tuple[str, int, int]:
    """(view, partition, offset) of a record in a dead or late topic: equal ones are the same reject."""
    found = dict(headers)
    return found["view"].decode(), int(found["partition"]), int(found["offset"])
