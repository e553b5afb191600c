"""Topics that grow or go while they are read."""

from concurrent.futures import wait

import pytest
from kafka.errors import NodeNotReadyError

from streaming.deriving.derivation import Derivation, Input
from streaming.deriving.topology import GROWTH_S, Growth, SupervisorError
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


def join(name: str, left: str, right: str) -> Derivation:
    inputs = tuple(Input(topic, topic, "", "time timestamp, item string", "time", 0) for topic in (left, right))
    return Derivation(name, "as_of_join", inputs, "item", "", 0, on="item")


def test_joined_topics_that_grow_one_after_the_other_are_followed_once_they_agree(caplog):
    now = [0.0]
    counts = {"a": 2, "b": 2, "c": 2, "d": 2, "e": 2}
    plans = [join("ab", "a", "b"), join("bc", "b", "c"), join("de", "d", "e")]
    growth = Growth(plans, monotonic_s=lambda: now[0])
    assert growth.follow(counts, {}) == {}
    for _ in range(3):
        now[0] += GROWTH_S / 4
        assert growth.follow(counts, {"a": 4, "b": 2, "c": 2}) == {}
    assert [record.view for record in caplog.records] == ["ab"]
    assert growth.follow(counts, {"d": 3, "e": 3}) == {"d": 3, "e": 3}
    counts |= {"d": 3, "e": 3}
    assert growth.follow(counts, {"b": 4}) == {}, "what is joined with one that waits waits too"
    assert growth.follow(counts, {"c": 4}) == {"a": 4, "b": 4, "c": 4}
    counts |= {"a": 4, "b": 4, "c": 4}
    now[0] += GROWTH_S
    assert growth.follow(counts, {"a": 4, "b": 4, "c": 4}) == {}
    assert growth.follow(counts, {"b": 6}) == {}
    now[0] += GROWTH_S - 1
    assert growth.follow(counts, {}) == {}
    now[0] += 1
    with pytest.raises(SupervisorError, match="joins 'a' with 4 partitions and 'b' with 6: give both equally many"):
        growth.follow(counts, {})
