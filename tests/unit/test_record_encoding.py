"""Record batches written here are those that Kafka's own libraries read, in the partitions that they would choose."""

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka.partitioner.default import murmur2
from kafka.record.memory_records import MemoryRecords

from streaming.producing.columns import Events, from_rows, rows
from streaming.producing.delivery import Delivery
from streaming.producing.encode import Batch, encode, encode_partition, packed
from streaming.simulators import bulk
from streaming.wire import parse_batch

messages = st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=300)), max_size=60)


def columns(pairs: list[tuple[bytes, bytes]], route: int = 0) -> Events:
    return from_rows(list(range(len(pairs))), [key for key, _ in pairs], [value for _, value in pairs], route)


def read(batch: Batch) -> list[tuple[bytes | None, bytes | None]]:
    """The records as kafka-python reads them, the checksum checked, and our own parser agreeing."""
    batch.sign(producer_id=77, epoch=3, sequence=11)
    found = MemoryRecords(batch.data).next_batch()
    assert found.validate_crc()
    assert (found.producer_id, found.producer_epoch, found.base_sequence) == (77, 3, 11)
    assert (found.records_count, found.last_offset_delta) == (batch.records, batch.records - 1)
    again = MemoryRecords(batch.data).next_batch()
    parsed = parse_batch(batch.partition, again)
    records = [(record.key, record.value) for record in found]
    assert records == [(parsed.key(row), parsed.value(row)) for row in range(len(parsed.offsets))]
    return records


@settings(deadline=None)  # a busy machine is no failure
@given(messages, st.integers(1, 7), st.sampled_from(["lz4", "none"]), st.integers(1, 2000))
def test_every_record_is_in_its_keys_partition_once_and_in_order(pairs, partitions, compression, batch_bytes) -> None:
    found: dict[int, list[tuple[bytes | None, bytes | None]]] = {number: [] for number in range(partitions)}
    for batch in encode(columns(pairs), [partitions], compression, batch_bytes):
        assert batch.raw_bytes <= 61 + max(batch_bytes, 400)
        found[batch.partition] += read(batch)
    for partition, records in found.items():
        assert records == [pair for pair in pairs if (murmur2(pair[0]) & 0x7FFFFFFF) % partitions == partition]


def test_each_route_has_partitions_of_its_own() -> None:
    both = [columns([(str(n).encode(), b"v") for n in range(50)], route) for route in (0, 1)]
    routes = np.concatenate([events.routes for events in both])
    one = columns([(str(n).encode(), b"v") for n in [*range(50)] * 2])
    events = Events(one.times_us, one.buffer, one.keys, one.values, routes)
    found = {(batch.route, batch.partition): batch.records for batch in encode(events, [2, 3])}
    assert sum(count for (route, _), count in found.items() if route == 0) == 50
    assert {at for at in found if at[0] == 1} == {(1, 0), (1, 1), (1, 2)}


def test_timestamps_are_kept_and_a_record_may_be_larger_than_a_batch() -> None:
    events = columns([(b"a", b"x" * 5000), (b"b", b"y"), (b"c", b"z")])
    stamps = np.array([1_700_000_000_500, 1_700_000_000_000, 1_700_000_009_000])
    batches = list(encode_partition(events, np.arange(3), stamps, 0, 4, "lz4", batch_bytes=100))
    assert batches[0].raw_bytes > 5000
    assert sum(batch.records for batch in batches) == 3
    found = []
    for batch in batches:
        batch.sign(1, 1, 1)
        found += parse_batch(4, MemoryRecords(batch.data).next_batch()).timestamps_ms.tolist()
    assert found == stamps.tolist()


def test_signing_again_changes_nothing_else() -> None:
    (batch,) = encode(columns([(b"k", b"v" * 100)]), [1])
    batch.sign(5, 1, 0)
    before = bytes(batch.data)
    batch.sign(5, 1, 9)
    assert bytes(batch.data) != before
    batch.sign(5, 1, 0)
    assert bytes(batch.data) == before


@settings(deadline=None, max_examples=20)  # a busy machine is no failure
@given(st.lists(st.text(max_size=5), min_size=1, max_size=80), st.integers(1, 4), st.integers(1, 30))
def test_packed_events_come_back_in_their_keys_partition_in_order(users, partitions, rows_a_message) -> None:
    before = pa.record_batch({"user": ["before", *users], "n": list(range(-1, len(users)))})
    table = before.slice(1)
    found: dict[int, list[tuple[str, int]]] = {number: [] for number in range(partitions)}
    for batch in packed(table, "user", np.arange(len(users)), partitions, rows_a_message):
        ((key, value),) = read(batch)
        assert key is None
        message = pa.ipc.open_stream(value).read_all()
        assert message.schema == table.schema
        assert 1 <= message.num_rows <= rows_a_message
        found[batch.partition] += [(row["user"], row["n"]) for row in message.to_pylist()]
    for partition, events in found.items():
        mine = [(murmur2(user.encode()) & 0x7FFFFFFF) % partitions == partition for user in users]
        assert events == [(user, n) for n, (user, here) in enumerate(zip(users, mine, strict=True)) if here]


def test_bulk_events_packed_or_not_are_the_same() -> None:
    plain = [orjson.loads(event.value) for event in rows(bulk.events(3000, keys=50, seed=4))]
    unpacked = []
    for batch in bulk.messages(3000, keys=50, partitions=3, seed=4):
        for _, value in read(batch):
            unpacked += pa.ipc.open_stream(value).read_all().to_pylist()
    unpacked.sort(key=lambda row: row["seq"])
    assert [row["seq"] for row in unpacked] == list(range(3000))
    for row, event in zip(unpacked, plain, strict=True):
        assert row | {"time": f"{row['time']:%Y-%m-%dT%H:%M:%S}.{row['time'].microsecond // 1000:03}Z"} == event


def test_bulk_events_are_of_the_size_that_is_promised_and_of_the_seed() -> None:
    events = list(rows(bulk.events(20_000, keys=10_000)))
    assert 95 < sum(len(event.key) + len(event.value) for event in events) / len(events) < 125
    assert events == list(rows(bulk.events(20_000, keys=10_000)))
    assert len({event.key for event in events}) > 8000
    stages = bulk.stages(1000, keys=10)
    assert set(stages) == {"generate", "disturb", "encode"}


class Produced:
    """Stands in for kafka-python's FutureProduceResult."""

    def __init__(self) -> None:
        self.callbacks: list = []
        self.errbacks: list = []

    def add_callback(self, function, *args) -> None:
        self.callbacks.append((function, args))

    def add_errback(self, function) -> None:
        self.errbacks.append(function)

    def answer(self, error: Exception | None = None) -> None:
        for function, args in self.callbacks:
            function(*args, (0, -1, None if error is None else lambda index: error))


def delivery(records: int) -> tuple[Delivery, Produced]:
    produced = Produced()
    return Delivery(Batch(0, 0, records, bytearray(), 1), produced), produced


def test_a_batch_that_the_producer_cuts_is_delivered_when_all_pieces_are() -> None:
    followed, _ = delivery(records=5)
    left, right, inner_left, inner_right = (Produced() for _ in range(4))
    for piece, count in ((left, 3), (right, 2), (inner_left, 2), (inner_right, 1)):  # the left one is cut again
        for index in range(count):
            followed.rebind(piece, index)
    for piece in (right, inner_left):
        piece.answer()
        with pytest.raises(Exception, match="no acknowledgement"):
            followed.wait(0)
    inner_right.answer()
    followed.wait(0)


def test_a_refused_batch_says_why() -> None:
    followed, produced = delivery(records=2)
    produced.answer(OSError("the disk is full"))
    with pytest.raises(OSError, match="the disk is full"):
        followed.wait(0)
