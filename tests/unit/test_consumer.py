"""The consumer over a kafka-python that is told what the broker says: a broker that is away, a topic made again."""

from types import SimpleNamespace

import pytest
from kafka import TopicPartition
from kafka.errors import LogTruncationError, OffsetOutOfRangeError

from streaming import consumer as consumer_module
from streaming.consumer import Consumer, OffsetError

ZERO, ONE = TopicPartition("edits", 0), TopicPartition("edits", 1)


class Kafka:
    """What `Consumer` uses of kafka-python: a real one cannot be kept waiting for hours, nor told when to answer."""

    def __init__(self, **_):
        self._fetcher = SimpleNamespace(_handle_fetch_response=lambda *_: None)
        self.assigned, self.on_hold, self.ends, self.starts, self.raises = set(), set(), {}, {}, None
        self.sought = {}
        self._subscription = SimpleNamespace(
            assignment={ZERO: SimpleNamespace(position=SimpleNamespace(offset=30))},
        )

    def assign(self, partitions):
        self.assigned = set(partitions)

    def assignment(self):
        return self.assigned

    def paused(self):
        return set(self.on_hold)

    def pause(self, *partitions):
        self.on_hold |= set(partitions)

    def resume(self, *partitions):
        self.on_hold -= set(partitions)

    def beginning_offsets(self, partitions):
        return {at: self.starts.get(at, 0) for at in partitions}

    def end_offsets(self, partitions):
        return {at: self.ends.get(at, 100) for at in partitions}

    def seek(self, at, offset):
        self.sought[at] = offset

    def poll(self, **_):
        if self.raises is not None:
            raise self.raises
        return {}

    def answers(self, *partitions, failed=(), error_code=0):
        """A fetch of these is answered; the answer names only those that failed."""
        named = [SimpleNamespace(partition_index=at.partition, error_code=3) for at in failed]
        response = SimpleNamespace(error_code=error_code, responses=[SimpleNamespace(topic="edits", partitions=named)])
        self._fetcher._handle_fetch_response(1, dict.fromkeys(partitions, 0), 0.0, response)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=1_000.0)
    monkeypatch.setattr(consumer_module, "time", SimpleNamespace(monotonic=lambda: now.s))
    return now


@pytest.fixture
def consumer(monkeypatch):
    monkeypatch.setattr(consumer_module, "KafkaConsumer", Kafka)
    made = Consumer("", "edits", "group")
    made.assign([0, 1])
    for partition in (0, 1):
        made.seek(partition, 30)
    return made


def test_pauses_without_an_answer_are_counted_for_each_partition(clock, consumer):
    broker = consumer._kafka
    for _ in range(100):
        clock.s += 0.5
        broker.answers(ZERO, ONE)
    assert consumer.unanswered_s() == {0: 0, 1: 0}
    clock.s += 1.9
    assert consumer.unanswered_s() == {0: 0, 1: 0}
    clock.s += 3_600
    assert consumer.unanswered_s() == pytest.approx({0: 3_601.9, 1: 3_601.9})
    broker.answers(ZERO, ONE, failed=[ONE])
    clock.s += 1
    assert consumer.unanswered_s() == pytest.approx({0: 3_601.9, 1: 3_602.9})
    broker.answers(ZERO, ONE, error_code=70)
    clock.s += 9
    broker.answers(ZERO, ONE)
    assert consumer.unanswered_s() == pytest.approx({0: 3_611.9, 1: 3_611.9})


def test_who_does_not_ask_is_not_without_an_answer(clock, consumer):
    broker = consumer._kafka
    clock.s += 5
    consumer.hold([1])
    clock.s += 600
    broker.answers(ZERO)
    assert consumer.unanswered_s() == {0: 605, 1: 5}
    consumer.hold([0])
    assert consumer.unanswered_s() == {0: 605, 1: 5}
    consumer.assign([0])
    clock.s += 600
    consumer.assign([0, 1])
    consumer.seek(1, 30)
    assert consumer.unanswered_s() == {0: 605, 1: 5}


def test_a_topic_that_was_deleted_and_made_again_is_an_error_where_it_ends_below_the_reader(consumer):
    broker = consumer._kafka
    broker.raises = OffsetOutOfRangeError({ZERO: 30})
    broker.ends[ZERO] = 7
    with pytest.raises(OffsetError, match=r"'edits' partition 0 ends at offset 7 but its checkpoint stands at 30: the"):
        consumer.poll(0.0, 10)
    with pytest.raises(OffsetError, match="start its views anew with --reset"):
        consumer.seek(0, 30)


@pytest.mark.parametrize("divergent", [None, 7])
def test_a_log_that_lost_what_was_read_is_an_error_also_where_it_is_long_enough_again(consumer, divergent):
    consumer._kafka.raises = LogTruncationError({ZERO: divergent})
    with pytest.raises(OffsetError, match="no longer holds what was read of it up to offset 30: the topic was deleted"):
        consumer.poll(0.0, 10)


def test_records_that_retention_took_from_under_the_reader_are_skipped_and_counted(consumer):
    broker = consumer._kafka
    broker.raises = OffsetOutOfRangeError({ZERO: 30})
    broker.starts[ZERO] = 45
    assert consumer.poll(0.0, 10) == []
    assert (broker.sought[ZERO], consumer.lost) == (45, {0: 15})
