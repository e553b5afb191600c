"""Topics that grow or go while they are read."""

from concurrent.futures import wait

import pytest
from kafka.errors import NodeNotReadyError

from streaming.topics import GONE_S, LOOK_S, TopicGoneError, TopicWatch


class Broker:
    def __init__(self):
        self.now_s, self.answer = 0.0, {"a": 2}

    def count(self, servers, topics):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def watch(self) -> TopicWatch:
        return TopicWatch("", ["a"], count=self.count, monotonic_s=lambda: self.now_s)


def asked(broker: Broker, watch: TopicWatch) -> dict[str, int]:
    """What the watch finds at its next turn."""
    broker.now_s += LOOK_S
    assert watch.look() == {}
    wait([watch._asked], 10)
    return watch.look()


def test_a_topic_that_grows_is_seen_and_a_broker_that_is_away_is_not_an_error():
    broker = Broker()
    watch = broker.watch()
    assert watch.look() == {}
    assert asked(broker, watch) == {"a": 2}
    broker.answer = NodeNotReadyError()
    assert asked(broker, watch) == {}
    broker.answer = {"a": 5}
    assert asked(broker, watch) == {"a": 5}
    watch.close()


def test_a_topic_that_is_deleted_is_waited_for_and_then_an_error():
    broker = Broker()
    watch = broker.watch()
    broker.answer = {}
    assert asked(broker, watch) == {}
    broker.answer = {"a": 2}
    assert asked(broker, watch) == {"a": 2}, "it came back"
    broker.answer = {}
    with pytest.raises(TopicGoneError, match="'a' was deleted"):
        for _ in range(2 + int(GONE_S / LOOK_S)):
            asked(broker, watch)
    watch.close()
