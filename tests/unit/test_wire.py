"""The columnar reader must hand out what kafka-python's own record iterator does, for any v2 batch."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka.errors import CorruptRecordError
from kafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder

from streaming.consumer import _packed, _pieces
from streaming.records import RecordBatch
from streaming.wire import _all_columnar, from_records, parse_batch

CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
DATA = st.none() | st.binary(max_size=200)
HEADERS = st.lists(st.tuples(st.text(max_size=5), DATA), max_size=3)
RECORDS = st.lists(st.tuples(DATA, DATA, HEADERS, st.integers(0, 10**13)), min_size=1, max_size=40)


def built(records, codec: int = 0, base_offset: int = 0) -> bytes:
    builder = DefaultRecordBatchBuilder(2, codec, False, -1, -1, -1, 1 << 24)
    for offset, (key, value, headers, timestamp_ms) in enumerate(records):
        assert builder.append(offset, timestamp_ms, key, value, headers) is not None
    data = bytearray(builder.build())
    struct.pack_into(">q", data, 0, base_offset)  # what a broker does; the CRC does not cover it
    return bytes(data)


def rows(batch: RecordBatch) -> list[tuple]:
    return [
        (int(offset), int(batch.timestamps_ms[row]), batch.key(row), batch.value(row))
        for row, offset in enumerate(batch.offsets)
    ]


def public(data: bytes) -> list[tuple]:
    return [(record.offset, record.timestamp, record.key, record.value) for record in DefaultRecordBatch(data)]


@settings(deadline=None, max_examples=60)
@given(records=RECORDS, codec=st.sampled_from(list(CODECS.values())), base_offset=st.integers(0, 2**50))
def test_columns_equal_the_public_path(records, codec, base_offset):
    data = built(records, codec, base_offset)
    assert rows(parse_batch(3, DefaultRecordBatch(data))) == public(data)
    assert rows(from_records(3, list(DefaultRecordBatch(data)))) == public(data)


def test_a_fetch_from_the_middle_of_a_batch_starts_there():
    data = built([(b"k", str(n).encode(), [], n) for n in range(10)], base_offset=100)
    assert [row[0] for row in rows(parse_batch(0, DefaultRecordBatch(data), first_offset=107))] == [107, 108, 109]
    assert rows(parse_batch(0, DefaultRecordBatch(data), first_offset=110)) == []


@settings(deadline=None, max_examples=60)
@given(cut=st.integers(1, 60), flip=st.integers(0, 60), value=st.integers(0, 255))
def test_damaged_bytes_are_refused_or_read_within_the_buffer(cut, flip, value):
    data = bytearray(built([(b"key", b"value", [("h", b"v")], n) for n in range(4)]))
    data[61 + flip] = value
    for damaged in (bytes(data), bytes(data[:-cut])):
        try:
            batch = parse_batch(0, DefaultRecordBatch(damaged))
        except CorruptRecordError:
            continue
        spans = np.concatenate([batch.keys, batch.values])
        assert spans.max() <= len(batch.buffer)


@pytest.mark.parametrize(
    ("at", "attributes", "columnar"),
    [(22, 0, True), (22, 4, True), (22, 0x10, True), (22, 0x30, True), (22, 5, False), (16, 1, False)],
)
def test_only_batches_of_the_current_format_take_the_fast_path(at, attributes, columnar):
    data = bytearray(built([(b"k", b"v", [], 1)]) * 2)
    data[at] = attributes
    assert _all_columnar(bytes(data)) is columnar


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8), limit=st.integers(1, 40))
def test_batches_are_joined_and_cut_without_changing_a_record(sizes, limit):
    batches, start = [], 0
    for size in sizes:
        records = [
            (None if n % 3 == 0 else b"key%d" % n, None if n % 5 == 0 else b"v%d" % n, [], n) for n in range(size)
        ]
        batches.append(parse_batch(0, DefaultRecordBatch(built(records, base_offset=start))))
        start += size
    pieces = [piece for batch in _packed(batches, limit) for piece in _pieces(batch, limit)]
    assert [row for piece in pieces for row in rows(piece)] == [row for batch in batches for row in rows(batch)]
    assert max(len(piece.offsets) for piece in pieces) <= limit
