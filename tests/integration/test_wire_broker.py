"""The columnar reader against a real broker: the same records as kafka-python's public path, in every codec."""

import signal
import time
from random import Random

import psutil
import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition

from streaming.consumer import Consumer, OffsetError
from streaming.topics import ensure_topics
from streaming.wire import ColumnarRecords
from tests.waiting import wait_for

CODECS = (None, "gzip", "snappy", "lz4", "zstd")


def read(consumer: Consumer, count: int, max_records: int) -> list[tuple]:
    rows: list[tuple] = []
    for _ in range(500):
        for batch in consumer.poll(0.2, max_records):
            assert len(batch.offsets) <= max_records
            times = batch.timestamps_ms.tolist()
            rows += [
                (int(offset), times[row], batch.key(row), batch.value(row)) for row, offset in enumerate(batch.offsets)
            ]
        if len(rows) >= count:
            break
    return rows


def test_every_codec_reads_the_same_as_the_public_path(kafka):
    topic = "wire-codecs"
    assert ensure_topics(kafka, {topic: 1}) == {topic: 1}
    produced = 0
    for codec in CODECS:
        producer = KafkaProducer(bootstrap_servers=kafka, compression_type=codec, linger_ms=20)
        for n in range(300):
            key = None if n % 7 == 0 else b"key-%d" % (n % 20)
            value = None if key and n % 11 == 0 else b'{"n": %d}' % n * (n % 5)
            producer.send(topic, key=key, value=value, headers=[("a", b"b")] * (n % 3))
            produced += 1
        producer.flush()
        producer.close()
    transactional = KafkaProducer(bootstrap_servers=kafka, transactional_id="wire-codecs")
    transactional.init_transactions()
    for commit in (True, False):
        transactional.begin_transaction()
        for _ in range(50):
            transactional.send(topic, b"committed" if commit else b"aborted")
        transactional.flush()
        transactional.commit_transaction() if commit else transactional.abort_transaction()
    transactional.close()
    produced += 50

    reference = KafkaConsumer(bootstrap_servers=kafka, isolation_level="read_committed", auto_offset_reset="earliest")
    partition = TopicPartition(topic, 0)
    reference.assign([partition])
    expected: list[tuple] = []
    for _ in range(100):
        for record in reference.poll(timeout_ms=200).get(partition, []):
            expected.append((record.offset, record.timestamp, record.key, record.value))
        if len(expected) >= produced:
            break
    reference.close()
    assert len(expected) == produced

    for columnar, max_records, start in ((True, 4096, None), (True, 7, 333), (False, 100, 333)):
        consumer = Consumer(kafka, topic, group="wire", columnar=columnar)
        consumer.assign([0])
        first = consumer.seek(0, start)
        assert read(consumer, produced - first, max_records) == expected[first:]
        consumer.poll(0.5, 10)  # steps over the abort marker at the end
        assert consumer.end_offsets() == {0: consumer.position(0)}
        assert consumer.lag() == {0: 0}
        consumer.close()


def test_offsets_that_retention_removed_are_skipped_and_counted(kafka):
    topic = "wire-retention"
    ensure_topics(kafka, {topic: 1})
    producer = KafkaProducer(bootstrap_servers=kafka)
    for n in range(30):
        producer.send(topic, b"%d" % n)
    producer.flush()
    producer.close()
    admin = KafkaAdminClient(bootstrap_servers=kafka)
    admin.delete_records({TopicPartition(topic, 0): 20})
    admin.close()
    consumer = Consumer(kafka, topic, group="wire")
    consumer.assign([0])
    assert consumer.seek(0, 5) == 20
    assert consumer.lost == {0: 15}
    assert [row[3] for row in read(consumer, 10, 100)] == [b"%d" % n for n in range(20, 30)]
    consumer.close()


def test_interleaved_transactions_read_the_same_as_the_public_path(kafka, monkeypatch):
    topic = "wire-transactions"
    ensure_topics(kafka, {topic: 1})
    producers = [KafkaProducer(bootstrap_servers=kafka, transactional_id=f"wire-{n}") for n in range(3)]
    plain = KafkaProducer(bootstrap_servers=kafka)
    for producer in producers:
        producer.init_transactions()
    random = Random(3)
    committed = 0
    for turn in range(12):
        for producer in producers:
            producer.begin_transaction()
        sent = [0, 0, 0]
        for piece in range(4):
            at = random.randrange(3)
            for n in range(random.randrange(1, 9)):
                producers[at].send(topic, value=b"%d/%d/%d/%d" % (turn, piece, at, n), key=b"k")
                sent[at] += 1
            producers[at].flush()
            plain.send(topic, value=b"plain %d" % turn)
            plain.flush()
        for at in random.sample(range(3), 3):
            if random.random() < 0.5:
                producers[at].commit_transaction()
                committed += sent[at]
            else:
                producers[at].abort_transaction()
        committed += 4
    producers[0].begin_transaction()
    producers[0].send(topic, value=b"of an open transaction")
    producers[0].flush()

    reference = KafkaConsumer(bootstrap_servers=kafka, isolation_level="read_committed", auto_offset_reset="earliest")
    partition = TopicPartition(topic, 0)
    reference.assign([partition])
    expected: list[tuple] = []
    for _ in range(100):
        for record in reference.poll(timeout_ms=200).get(partition, []):
            expected.append((record.offset, record.timestamp, record.key, record.value))
        if len(expected) >= committed:
            break
    reference.close()
    assert len(expected) == committed

    monkeypatch.setattr(ColumnarRecords, "_unpack_publicly", None)
    for max_records, first in ((4096, 0), (5, 0), (4096, committed // 3), (3, committed // 2)):
        consumer = Consumer(kafka, topic, group="wire")
        consumer.assign([0])
        consumer.seek(0, expected[first][0])
        assert read(consumer, committed - first, max_records) == expected[first:]
        assert read(consumer, 0, 10) == []
        assert consumer.end_offsets() == {0: consumer.position(0)}  # the open transaction is not shown yet
        consumer.close()
    for producer in (*producers, plain):
        producer.close()


def test_a_partition_on_hold_gives_nothing_until_it_is_let_go(kafka):
    topic = "wire-hold"
    ensure_topics(kafka, {topic: 2})
    producer = KafkaProducer(bootstrap_servers=kafka)
    for n in range(40):
        producer.send(topic, value=b"%d" % n, partition=n % 2)
    producer.flush()
    producer.close()
    consumer = Consumer(kafka, topic, group="wire")
    consumer.assign([0, 1])
    for partition in (0, 1):
        consumer.seek(partition, 0)
    consumer.hold([1])
    assert [row[3] for row in read(consumer, 20, 100)] == [b"%d" % n for n in range(0, 40, 2)]
    assert read(consumer, 0, 100) == []
    consumer.hold([])
    assert [row[3] for row in read(consumer, 20, 100)] == [b"%d" % n for n in range(1, 40, 2)]
    consumer.close()


def test_only_the_time_in_which_the_broker_says_nothing_counts_as_unanswered(kafka):
    topic = "wire-unanswered"
    ensure_topics(kafka, {topic: 2})
    consumer = Consumer(kafka, topic, group="wire")
    consumer.assign([0, 1])
    for partition in (0, 1):
        consumer.seek(partition, 0)
    (broker,) = {
        psutil.Process(one.pid)
        for one in psutil.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr[1] == int(kafka.rpartition(":")[2])
    }

    def unanswered_s(seconds: float) -> dict[int, float]:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            assert consumer.poll(0.02, 100) == []
        return consumer.unanswered_s()

    assert unanswered_s(4) == {0: 0.0, 1: 0.0}
    consumer.hold([1])
    assert unanswered_s(4) == {0: 0.0, 1: 0.0}
    consumer.hold([])
    assert unanswered_s(1) == {0: 0.0, 1: 0.0}
    broker.send_signal(signal.SIGSTOP)
    try:
        away = unanswered_s(5)
    finally:
        broker.send_signal(signal.SIGCONT)
    assert all(4 < seconds < 7 for seconds in away.values())
    assert consumer.lag() == {0: 0, 1: 0}, "the broker has told nothing else"
    back = unanswered_s(3)
    assert back == unanswered_s(3)
    assert all(4 < seconds < 9 for seconds in back.values())
    consumer.close()


def test_a_topic_that_was_deleted_and_made_again_is_noticed_by_who_reads_it(kafka):
    topic = "wire-again"
    ensure_topics(kafka, {topic: 1})

    def produce(values: int) -> None:
        producer = KafkaProducer(bootstrap_servers=kafka)
        for n in range(values):
            producer.send(topic, b"%d" % n)
        producer.flush()
        producer.close()

    produce(30)
    consumer = Consumer(kafka, topic, group="wire")
    consumer.assign([0])
    consumer.seek(0, None)
    assert len(read(consumer, 30, 100)) == 30
    admin = KafkaAdminClient(bootstrap_servers=kafka)
    admin.delete_topics([topic])
    wait_for(lambda: topic not in admin.list_topics(), "the topic to go")
    assert read(consumer, 0, 100) == [], "while it is gone the reader waits"
    wait_for(lambda: ensure_topics(kafka, {topic: 1}) == {topic: 1}, "the topic to come")
    produce(10)
    with pytest.raises(OffsetError, match=r"(stands at|up to offset) 30: the topic was deleted.* --reset"):
        read(consumer, 30, 100)
    with pytest.raises(OffsetError, match="was deleted and made again"):
        consumer.seek(0, 30)
    admin.close()
    consumer.close()
