"""The log of predictions never blocks, loses nothing silently and comes back after a broker's death.

Producers are fakes, because what is tested is what happens when a broker refuses, hangs and returns.
"""

import threading
from collections import Counter

import orjson

from serving.predictions import PredictionLog


class Future:
    def __init__(self, error=None):
        self.error = error

    def get(self, timeout):
        if self.error:
            raise self.error


class Broker:
    """Takes messages while `up`; `arrived` is set by the first."""

    def __init__(self, up=True):
        self.up = up
        self.messages = []
        self.opened = 0
        self.arrived = threading.Event()

    def open(self):
        self.opened += 1
        if not self.up:
            raise OSError("refused")
        return self

    def send(self, topic, *, key, value):
        if not self.up:
            return Future(OSError("gone"))
        self.messages.append((topic, key, orjson.loads(value)))
        self.arrived.set()
        return Future()

    def close(self, timeout=None):
        pass


class Counts:
    def __init__(self):
        self.dropped = Counter()
        self.published = 0
        self.changed = threading.Condition()

    def on_published(self, count):
        with self.changed:
            self.published += count
            self.changed.notify_all()

    def on_dropped(self, reason, count):
        with self.changed:
            self.dropped[reason] += count
            self.changed.notify_all()

    def wait_for(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, 30)


def log_of(broker, counts, max_queue=100):
    return PredictionLog(
        broker.open,
        max_queue=max_queue,
        on_published=counts.on_published,
        on_dropped=counts.on_dropped,
        pause_s=0.0,
    )


def test_records_arrive_keyed_by_their_id_and_a_close_sends_what_waits():
    broker, counts = Broker(), Counts()
    log = log_of(broker, counts)
    for number in range(50):
        log.publish({"id": f"r{number}", "output": {"probability": 0.5}})
    log.close(30)
    assert [key for _, key, _ in broker.messages] == [f"r{number}".encode() for number in range(50)]
    assert {topic for topic, _, _ in broker.messages} == {"predictions"}
    assert counts.published == 50
    assert not counts.dropped


def test_a_dead_broker_loses_records_with_a_count_and_gets_the_later_ones():
    broker, counts = Broker(up=False), Counts()
    log = log_of(broker, counts)
    log.publish({"id": "lost"})
    counts.wait_for(lambda: counts.dropped["broker"] == 1)
    broker.up = True
    log.publish({"id": "kept"})
    counts.wait_for(lambda: counts.published == 1)
    broker.up = False
    log.publish({"id": "lost too"})
    counts.wait_for(lambda: counts.dropped["broker"] == 2)
    broker.up = True
    log.publish({"id": "kept too"})
    log.close(30)
    assert [key for _, key, _ in broker.messages] == [b"kept", b"kept too"]


def test_a_full_queue_drops_at_once():
    counts = Counts()
    hanging = threading.Event()
    opened = threading.Event()
    broker = Broker()

    def open_slowly():
        opened.set()
        assert hanging.wait(30)
        return broker

    log = PredictionLog(
        open_slowly, max_queue=3, on_published=counts.on_published, on_dropped=counts.on_dropped, pause_s=0.0
    )
    log.publish({"id": "first"})
    assert opened.wait(30)
    for number in range(5):
        log.publish({"id": str(number)})
    assert counts.dropped == {"queue_full": 2}
    hanging.set()
    log.close(30)
    assert counts.published == 4


def test_a_record_that_is_no_json_is_dropped_alone():
    broker, counts = Broker(), Counts()
    log = log_of(broker, counts)
    log.publish({"id": "bad", "output": object()})
    log.publish({"id": "good", "output": None})
    log.close(30)
    assert [key for _, key, _ in broker.messages] == [b"good"]
    assert counts.dropped == {"record": 1}
    assert counts.published == 1
