"""Detections of drift on the topic `control`, where whoever trains the models that read the features listens.

A message is an event of `events.CONTROL`: `model` is the view and the column that the detector adds, `action` is
"drift", `time` the event time, `reason` says what was seen; `partition` and `offset` name the event of the view's topic
at which it was seen. After a crash the records since the last checkpoint are read again, so one detection can be
published twice: a reader keeps the first of each (model, partition, offset).
"""

from collections.abc import Sequence

import orjson
from kafka import KafkaProducer

from streaming.events import CONTROL
from streaming.producing.producer import Message, connect, send
from streaming.records import Drift, iso
from streaming.topics import ensure_topics


class DriftLog:
    """Publishes what the models of one view detect; the topic is made where it is missing.

    Args:
        bootstrap_servers: `host:port,host:port`.
        view: whose models they are.
    """

    def __init__(self, bootstrap_servers: str, view: str) -> None:
        self._servers, self._view = bootstrap_servers, view
        self._producer: KafkaProducer | None = None

    def write(self, drifts: Sequence[Drift]) -> None:
        """Publish them and wait until the broker has them.

        Raises:
            KafkaError: the broker did not take them in time; writing the same ones again is safe.
        """
        if not drifts:
            return
        if self._producer is None:
            ensure_topics(self._servers, {CONTROL.name: CONTROL.partitions})
            self._producer = connect(self._servers)
        send(self._producer, [Message(CONTROL.name, *message(self._view, drift)) for drift in drifts])

    def close(self) -> None:
        """Leave the broker."""
        if self._producer is not None:
            self._producer.close(timeout=2)


def message(view: str, drift: Drift) -> tuple[bytes, bytes]:
    """Key and value of a record of `control`."""
    model = f"{view}.{drift.column}"
    event = {
        "model": model,
        "time": iso(drift.time_us),
        "action": "drift",
        "reason": drift.reason,
        "partition": drift.partition,
        "offset": drift.offset,
    }
    return model.encode(), orjson.dumps(event)
