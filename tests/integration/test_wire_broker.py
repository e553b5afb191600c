"""The columnar reader against a real broker: the same records as kafka-python's public path, in every codec."""

from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from streaming.topics import ensure_topics
from streaming.wire import Consumer

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
    from kafka import KafkaAdminClient

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
