"""From columns to Kafka's v2 record batches: the mirror of the parser in `streaming.wire`.

The format is that of https://kafka.apache.org/documentation/#recordbatch, the choice of partition that of every
client's default partitioner: murmur2 of the key.
"""

import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from crc32c import crc32c
from kafka.codec import lz4_encode

from streaming.compile_kernels import kernel
from streaming.producing.columns import Events, from_rows
from streaming.records import Bytes, Ints

BATCH_BYTES = 512 * 1024
"""Uncompressed size at which a batch is full, unless one record is larger: half of what brokers take by default."""
PACKED_ROWS = 1_000
Compression = Literal["lz4", "none"]

_HEADER = struct.Struct(">qiibIhiqqqhii")
_PRODUCER = struct.Struct(">qhi")
_PRODUCER_AT, _CRC_AT, _CHECKED_FROM, _LENGTH_FROM, _FLAGS_AT = 43, 17, 21, 12, 22
_RECORD_OVERHEAD = 32
_LZ4, _TRANSACTIONAL = 3, 0x10


@dataclass(slots=True)
class Batch:
    """One record batch with its header, complete but for its producer and its checksum.

    Attributes:
        route: Which of the source's topics it goes to.
        partition: Of that topic.
        records: How many it holds.
        data: The bytes to send, after `sign`.
        raw_bytes: Their size before compression.
    """

    route: int
    partition: int
    records: int
    data: bytearray
    raw_bytes: int

    def sign(self, producer_id: int, epoch: int, sequence: int, transactional: bool = False) -> None:
        """Write who sends it, as its position in that producer's sequence, and the checksum over all of it."""
        if transactional:
            self.data[_FLAGS_AT] |= _TRANSACTIONAL
        _PRODUCER.pack_into(self.data, _PRODUCER_AT, producer_id, epoch, sequence)
        struct.pack_into(">I", self.data, _CRC_AT, crc32c(memoryview(self.data)[_CHECKED_FROM:]))


def encode(
    events: Events, partitions: Sequence[int], compression: Compression = "lz4", batch_bytes: int = BATCH_BYTES
) -> Iterator[Batch]:
    """Batches that hold all events, in their order within a partition, with the present as their timestamp.

    Args:
        events: what to send.
        partitions: how many partitions each route's topic has.
        compression: of the records; a batch that it makes no smaller goes uncompressed.
        batch_bytes: the most a batch holds before compression, unless a single record is larger.
    """
    counts = np.asarray(partitions, dtype=np.int64)
    first = np.cumsum(counts) - counts
    slots = np.empty(len(events), dtype=np.int64)
    _choose_partitions(events.buffer, events.keys, events.routes, counts, first, slots)
    order = np.argsort(slots.astype(np.int16) if counts.sum() < 2**15 else slots, kind="stable")  # int16: by radix
    bounds = np.searchsorted(slots[order], np.arange(counts.sum() + 1)).tolist()
    now_ms = np.full(len(events), time.time_ns() // 1_000_000, dtype=np.int64)
    for route, (start, count) in enumerate(zip(first.tolist(), counts.tolist(), strict=True)):
        for partition in range(count):
            rows = order[bounds[start + partition] : bounds[start + partition + 1]]
            yield from encode_partition(events, rows, now_ms, route, partition, compression, batch_bytes)


def encode_partition(
    events: Events,
    rows: Ints,
    timestamps_ms: Ints,
    route: int,
    partition: int,
    compression: Compression = "lz4",
    batch_bytes: int = BATCH_BYTES,
) -> Iterator[Batch]:
    """Batches of the events at `rows`, all for one partition; `timestamps_ms` is [N] for all events."""
    if not len(rows):
        return
    keys, values = events.keys[rows], events.values[rows]
    sizes = keys[:, 1] - keys[:, 0] + values[:, 1] - values[:, 0] + _RECORD_OVERHEAD
    out = np.empty(min(max(batch_bytes, int(sizes.max())), int(sizes.sum())), dtype=np.uint8)
    row = 0
    while row < len(rows):
        stop, used = encode_records(events.buffer, events.keys, events.values, timestamps_ms, rows, row, out)
        times = timestamps_ms[rows[row:stop]]
        yield _finished(out[:used], times, route, partition, compression)
        row = stop


def packed(batch: pa.RecordBatch, key: str, time_us: Ints, partitions: int, rows: int = PACKED_ROWS) -> Iterator[Batch]:
    """Arrow IPC messages of up to `rows` events, each one stream of one batch, as one record without a key.

    Every event goes to the partition of its `key` column's text, so all events of a key stay in order in one
    partition, as they do unpacked. A message has no timestamp of its own; `time_us` [N] puts it among the others.
    """
    chosen = _partitions(batch.column(key).cast(pa.large_string()), partitions)
    now_ms = np.full(1, time.time_ns() // 1_000_000, dtype=np.int64)
    for partition in range(partitions):
        mine = np.flatnonzero(chosen == partition)
        for start in range(0, len(mine), rows):
            some = mine[start : start + rows]
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch.take(pa.array(some)))
            message = from_rows([int(time_us[some[0]])], [b""], [sink.getvalue().to_pybytes()])
            message.keys[:] = -1
            yield from encode_partition(message, np.zeros(1, dtype=np.int64), now_ms, 0, partition)


def _partitions(texts: pa.Array, partitions: int) -> Ints:
    """The partition of each key of a column of large strings."""
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
    text = np.array(np.frombuffer(data or b"", dtype=np.uint8))
    slots, none = np.empty(len(texts), dtype=np.int64), np.zeros(1, dtype=np.int64)
    routes = np.zeros(len(texts), dtype=np.uint8)
    _choose_partitions(text, np.stack([ends[:-1], ends[1:]], axis=1), routes, np.array([partitions]), none, slots)
    return slots


def _finished(body: Bytes, timestamps_ms: Ints, route: int, partition: int, compression: Compression) -> Batch:
    raw = body.data
    attributes = 0
    payload: bytes | memoryview = raw
    if compression == "lz4":
        payload = lz4_encode(raw)
        attributes = _LZ4
        if len(payload) >= len(raw):
            payload, attributes = raw, 0
    count = len(timestamps_ms)
    header = _HEADER.pack(
        0,
        _HEADER.size - _LENGTH_FROM + len(payload),
        0,
        2,
        0,
        attributes,
        count - 1,
        int(timestamps_ms[0]),
        int(timestamps_ms.max()),
        -1,
        -1,
        -1,
        count,
    )
    return Batch(route, partition, count, bytearray().join((header, payload)), _HEADER.size + len(raw))


@kernel
def _murmur2(data: Bytes, start: int, end: int) -> int:
    """The hash of a key as Kafka's clients compute it, without its sign bit."""
    mask = np.uint64(0xFFFFFFFF)
    mix = np.uint64(0x5BD1E995)
    size = end - start
    state = np.uint64(0x9747B28C) ^ np.uint64(size)
    whole = start + size // 4 * 4
    for at in range(start, whole, 4):
        word = np.uint64(data[at]) | (np.uint64(data[at + 1]) << np.uint64(8))
        word |= (np.uint64(data[at + 2]) << np.uint64(16)) | (np.uint64(data[at + 3]) << np.uint64(24))
        word = (word * mix) & mask
        word ^= word >> np.uint64(24)
        word = (word * mix) & mask
        state = ((state * mix) & mask) ^ word
    for at in range(end - 1, whole - 1, -1):
        state ^= np.uint64(data[at]) << np.uint64(8 * (at - whole))
    if whole < end:
        state = (state * mix) & mask
    state ^= state >> np.uint64(13)
    state = (state * mix) & mask
    state ^= state >> np.uint64(15)
    return int(np.int64(state & np.uint64(0x7FFFFFFF)))


@kernel
def _choose_partitions(buffer: Bytes, keys: Ints, routes: Bytes, counts: Ints, first: Ints, slots: Ints) -> None:
    """Fill `slots` with the partition of each key among those of all routes."""
    for row in range(len(slots)):
        route = routes[row]
        slots[row] = first[route] + _murmur2(buffer, keys[row, 0], keys[row, 1]) % counts[route]


@kernel
def _varint_bytes(value: int) -> int:
    rest = np.uint64(value << 1) ^ np.uint64(value >> 63)
    size = 1
    while rest >= np.uint64(128):
        rest >>= np.uint64(7)
        size += 1
    return size


@kernel
def _write_varint(value: int, out: Bytes, at: int) -> int:
    """Write a zigzag varint; returns the position after it."""
    rest = np.uint64(value << 1) ^ np.uint64(value >> 63)
    while rest >= np.uint64(128):
        out[at] = np.uint8(rest & np.uint64(127)) | np.uint8(128)
        rest >>= np.uint64(7)
        at += 1
    out[at] = np.uint8(rest)
    return at + 1


@kernel
def _write_bytes(source: Bytes, start: int, end: int, out: Bytes, at: int) -> int:
    """Write a length and the bytes; a start of -1 is a null."""
    if start < 0:
        return _write_varint(-1, out, at)
    at = _write_varint(end - start, out, at)
    first, to = np.uint64(start), np.uint64(at)  # unsigned: no check for an index from the end
    for index in range(np.uint64(end - start)):
        out[to + index] = source[first + index]
    return at + end - start


@kernel
def encode_records(
    buffer: Bytes, keys: Ints, values: Ints, timestamps_ms: Ints, rows: Ints, first: int, out: Bytes
) -> tuple[int, int]:
    """Write the records at `rows[first:]` until `out` is full; returns the row after the last and the bytes used."""
    at = 0
    base_ms = timestamps_ms[rows[first]]
    for index in range(first, len(rows)):
        row = rows[index]
        delta_ms = timestamps_ms[row] - base_ms
        key_bytes, value_bytes = keys[row, 1] - keys[row, 0], values[row, 1] - values[row, 0]
        key_length = -1 if keys[row, 0] < 0 else key_bytes
        value_length = -1 if values[row, 0] < 0 else value_bytes
        size = 2 + _varint_bytes(delta_ms) + _varint_bytes(index - first)
        size += _varint_bytes(key_length) + key_bytes + _varint_bytes(value_length) + value_bytes
        if at + size + _varint_bytes(size) > len(out):
            return index, at
        at = _write_varint(size, out, at)
        out[at] = 0
        at = _write_varint(delta_ms, out, at + 1)
        at = _write_varint(index - first, out, at)
        at = _write_bytes(buffer, keys[row, 0], keys[row, 1], out, at)
        at = _write_bytes(buffer, values[row, 0], values[row, 1], out, at)
        out[at] = 0
        at += 1
    return len(rows), at
