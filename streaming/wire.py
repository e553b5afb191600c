"""From the bytes of Kafka to columns: one `RecordBatch` instead of one Python object a record.

kafka-python decodes record by record, which costs 4-12 microseconds each. Here the decompressed bytes of a whole v2
record batch are parsed in one pass by numba. Of transactions, only what was committed comes out: control batches and
what was aborted are stepped over. The hook is `Fetcher.PartitionRecords`, which is private: `Consumer` uses it only
with the versions that were tried, and every fetch that holds anything but v2 batches in a known codec goes through the
public path of kafka-python.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from kafka import TopicPartition
from kafka.consumer.fetcher import Fetcher
from kafka.errors import CorruptRecordError, KafkaError
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.memory_records import MemoryRecords

from streaming.compile_kernels import kernel
from streaming.records import Bytes, Ints, RecordBatch

RECORDS_A_CHUNK = 1_000
MAGIC_AT, ATTRIBUTES_AT, HEADER_BYTES = 16, 21, 61
CODEC = 0x07
CODECS = 4


class _Item(NamedTuple):
    """What takes the place of a record in kafka-python's fetcher: `offset` is the last one of the batch."""

    offset: int
    batch: RecordBatch


class ColumnarRecords(Fetcher.PartitionRecords):  # type: ignore[misc]  # kafka-python has no types
    """Records of one fetched partition, handed out batch by batch."""

    def _unpack_records(
        self, tp: TopicPartition, records: MemoryRecords, key_deserializer: Any, value_deserializer: Any
    ) -> Iterator[_Item]:
        if not _all_columnar(records._buffer):
            yield from self._unpack_publicly(tp, records, key_deserializer, value_deserializer)
            return
        while (batch := records.next_batch()) is not None:
            self.leader_epoch = batch.leader_epoch
            if self.check_crcs and not batch.validate_crc():
                raise CorruptRecordError(f"Record batch of {tp} at offset {batch.base_offset} failed its CRC check")
            if self._steps_over(batch):
                self.next_fetch_offset = batch.next_offset
                continue
            columns = parse_batch(tp.partition, batch, self.fetch_offset)
            self.next_fetch_offset = batch.next_offset
            self.records_read += len(columns.offsets)
            self.bytes_read += batch.size_in_bytes
            if len(columns.offsets):
                yield _Item(batch.last_offset, columns)
        self.drain()

    def _steps_over(self, batch: DefaultRecordBatch) -> bool:
        """Whether a batch ends a transaction or belongs to one that was aborted; they must be shown in their order."""
        if batch.has_producer_id():
            self._consume_aborted_transactions_up_to(batch.last_offset)
            if self._contains_abort_marker(batch):
                self.aborted_producer_ids.discard(batch.producer_id)
            elif self._is_batch_aborted(batch):
                return True
        return bool(batch.is_control_batch)

    def _unpack_publicly(
        self, tp: TopicPartition, records: MemoryRecords, key_deserializer: Any, value_deserializer: Any
    ) -> Iterator[_Item]:
        chunk: list[Any] = []
        failure: Exception | None = None
        try:
            for record in super()._unpack_records(tp, records, key_deserializer, value_deserializer):
                if record.offset >= self.fetch_offset:
                    chunk.append(record)
                if len(chunk) == RECORDS_A_CHUNK:
                    yield _Item(record.offset, from_records(tp.partition, chunk))
                    chunk = []
        except KafkaError as error:
            failure = error
        if chunk:
            yield _Item(chunk[-1].offset, from_records(tp.partition, chunk))
        if failure is not None:
            raise failure


def parse_batch(partition: int, batch: DefaultRecordBatch, first_offset: int = 0) -> RecordBatch:
    """The records of a v2 batch from `first_offset` on, as columns over its decompressed bytes.

    Raises:
        CorruptRecordError: the bytes are no well-formed records.
    """
    batch._maybe_uncompress()
    buffer: Bytes = np.frombuffer(batch._buffer, dtype=np.uint8)
    count = batch.records_count
    offsets, timestamps_ms = np.empty(count, np.int64), np.empty(count, np.int64)
    keys, values = np.empty((count, 2), np.int64), np.empty((count, 2), np.int64)
    end = parse_records(
        buffer, batch._pos, batch.base_offset, batch.first_timestamp, offsets, timestamps_ms, keys, values
    )
    if end != len(buffer):
        raise CorruptRecordError(f"Record batch of partition {partition} at offset {batch.base_offset} is malformed")
    if batch.timestamp_type:
        timestamps_ms[:] = batch.max_timestamp
    start = int(np.searchsorted(offsets, first_offset))
    return RecordBatch(partition, buffer, offsets[start:], keys[start:], values[start:], timestamps_ms[start:])


def from_records(partition: int, records: Sequence[Any]) -> RecordBatch:
    """Columns made of kafka-python's own records (attributes offset, timestamp, key, value)."""
    keys, values = [record.key for record in records], [record.value for record in records]
    key_spans, value_spans = _spans(keys, 0), _spans(values, sum(len(key) for key in keys if key))
    return RecordBatch(
        partition,
        np.frombuffer(b"".join([part for part in (*keys, *values) if part]), dtype=np.uint8),
        np.array([record.offset for record in records], dtype=np.int64),
        key_spans,
        value_spans,
        np.array([record.timestamp for record in records], dtype=np.int64),
    )


def _spans(parts: Sequence[bytes | None], start: int) -> Ints:
    """Where each part lies, [N, 2], when they follow one another from `start` on; -1 for None."""
    lengths = np.array([-1 if part is None else len(part) for part in parts], dtype=np.int64)
    ends = start + np.cumsum(np.maximum(lengths, 0))
    spans = np.stack([ends - lengths, ends], axis=1)
    spans[lengths < 0] = -1
    return spans


def _all_columnar(buffer: bytes) -> bool:
    """Whether a fetch holds only complete v2 batches in a codec that is known."""
    at = 0
    while at + HEADER_BYTES <= len(buffer):
        (length,) = struct.unpack_from(">i", buffer, at + 8)
        (attributes,) = struct.unpack_from(">h", buffer, at + ATTRIBUTES_AT)
        if buffer[at + MAGIC_AT] != 2 or attributes & CODEC > CODECS:
            return False
        at += 12 + length
    return True


@kernel
def _varint(buffer: Bytes, at: int) -> tuple[int, int]:
    """A zigzag varint and the position after it; position -1 if the bytes end or it is too long."""
    value = np.uint64(0)
    shift = np.uint64(0)
    while at >= 0 and at < len(buffer) and shift < np.uint64(70):
        byte = np.uint64(buffer[at])
        value |= (byte & np.uint64(127)) << shift
        at += 1
        if byte < np.uint64(128):
            return int(np.int64(value >> np.uint64(1)) ^ -np.int64(value & np.uint64(1))), at
        shift += np.uint64(7)
    return 0, -1


@kernel
def parse_records(
    buffer: Bytes,
    at: int,
    base_offset: int,
    first_timestamp_ms: int,
    offsets: Ints,
    timestamps_ms: Ints,
    keys: Ints,
    values: Ints,
) -> int:
    """Fill the columns from the records at `at`; returns the position after the last, -1 if they are malformed."""
    size = len(buffer)
    for row in range(len(offsets)):
        length, at = _varint(buffer, at)
        end = at + length
        if at < 0 or length < 1 or end > size:
            return -1
        delta_ms, at = _varint(buffer, at + 1)
        delta, at = _varint(buffer, at)
        offsets[row] = base_offset + delta
        timestamps_ms[row] = first_timestamp_ms + delta_ms
        for spans in (keys, values):
            length, at = _varint(buffer, at)
            if at < 0 or length > end - at:
                return -1
            if length < 0:
                spans[row, 0] = spans[row, 1] = -1
            else:
                spans[row, 0], spans[row, 1] = at, at + length
                at += length
        headers, at = _varint(buffer, at)
        for _ in range(2 * headers):
            length, at = _varint(buffer, at)
            if at < 0 or length > end - at:
                return -1
            if length > 0:
                at += length
        if at != end:
            return -1
    return at
