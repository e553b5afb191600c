"""From Kafka to columns: a consumer that yields `RecordBatch`es instead of one Python object a record.

kafka-python decodes record by record, which costs 4-12 microseconds each. Here the decompressed bytes of a whole v2
record batch are parsed in one pass by numba. Of transactions, only what was committed comes out: control batches and
what was aborted are stepped over. The hook is `Fetcher.PartitionRecords`, which is private: it is used only with the
versions that were tried, and every fetch that holds anything but v2 batches in a known codec goes through the public
path of kafka-python.
"""

import gc
import logging
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import kafka
import numpy as np
from kafka import KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka.consumer.fetcher import Fetcher
from kafka.errors import CorruptRecordError, KafkaError, OffsetOutOfRangeError
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.memory_records import MemoryRecords

from streaming.compile_kernels import kernel
from streaming.records import Bytes, Ints, RecordBatch

log = logging.getLogger(__name__)

COLUMNAR_VERSIONS = ("3.0.",)
BATCHES_A_POLL = 32
RECORDS_A_CHUNK = 1_000
LARGE_BATCH = 4_096
MAGIC_AT, ATTRIBUTES_AT, HEADER_BYTES = 16, 21, 61
CODEC = 0x07
CODECS = 4


class OffsetError(ValueError):
    """A stored offset that lies beyond the end of its topic: the topic was deleted and made again."""


class Consumer:
    """Reads chosen partitions of one topic from given offsets; commits are advisory and never decide where it starts.

    Args:
        bootstrap_servers: `host:port,host:port`.
        topic: the topic; it must exist.
        group: name under which `commit` reports progress to Kafka's own tools.
        columnar: False forces the public path of kafka-python.
    """

    def __init__(self, bootstrap_servers: str, topic: str, group: str, columnar: bool = True) -> None:
        self.topic = topic
        self.lost: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._kafka = KafkaConsumer(
            bootstrap_servers=bootstrap_servers.split(","),
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            allow_auto_create_topics=False,
            max_partition_fetch_bytes=4 << 20,
            reconnect_backoff_max_ms=1_000,
        )
        self._reported: dict[TopicPartition, OffsetAndMetadata] = {}
        self._columnar = columnar and kafka.__version__.startswith(COLUMNAR_VERSIONS)
        if self._columnar:
            self._kafka._fetcher.PartitionRecords = ColumnarRecords
        elif columnar:
            log.warning("kafka-python %s was not tried with the columnar reader: reading is slower", kafka.__version__)

    def assign(self, partitions: Iterable[int]) -> None:
        """Take these partitions; each needs a `seek` before the first `poll`."""
        self._kafka.assign([TopicPartition(self.topic, partition) for partition in partitions])

    def seek(self, partition: int, offset: int | None) -> int:
        """Start at `offset` (None: at the earliest) and return where reading really starts.

        Offsets that retention has removed are skipped: logged, and counted in `lost`.

        Raises:
            OffsetError: `offset` lies beyond the end of the partition.
        """
        at = TopicPartition(self.topic, partition)
        earliest = int(self._kafka.beginning_offsets([at])[at])
        start = earliest if offset is None else offset
        end = self._ends[partition] = int(self._kafka.end_offsets([at])[at])
        if start > end:
            raise OffsetError(
                f"Topic {self.topic!r} partition {partition} ends at offset {end} but its checkpoint stands at {start}:"
                " the topic was deleted and made again; remove the checkpoints of its views to start anew."
            )
        if start < earliest:
            self.lost[partition] = self.lost.get(partition, 0) + earliest - start
            log.warning(
                "records removed by retention before they were read",
                extra={"topic": self.topic, "partition": partition, "offset": start, "lost": earliest - start},
            )
        self._kafka.seek(at, max(start, earliest))
        return max(start, earliest)

    def hold(self, partitions: Iterable[int]) -> None:
        """Let `poll` hand out nothing of these partitions, and of all others again what comes."""
        held = {TopicPartition(self.topic, partition) for partition in partitions}
        self._kafka.resume(*(self._kafka.paused() - held))
        self._kafka.pause(*held)

    def poll(self, timeout_s: float, max_records: int) -> list[RecordBatch]:
        """Batches of at most `max_records` records, each of one partition, in offset order within a partition.

        Empty when nothing came within `timeout_s` or while the broker is away (kafka-python reconnects by itself).

        Raises:
            OffsetError: the topic was deleted and made again while it was read.
        """
        limit = BATCHES_A_POLL if self._columnar else max_records
        try:
            with _no_garbage_collection():
                polled = self._kafka.poll(timeout_ms=int(timeout_s * 1000), max_records=limit)
                found = [self._columns(at.partition, items) for at, items in polled.items()]
                del polled
        except OffsetOutOfRangeError as error:
            for at, offset in error.args[0].items():
                self.seek(at.partition, int(getattr(offset, "offset", offset)))
            return []
        batches: list[RecordBatch] = []
        for parts in found:
            batches.extend(piece for batch in _packed(parts, max_records) for piece in _pieces(batch, max_records))
        return batches

    def _columns(self, partition: int, items: Sequence[Any]) -> list[RecordBatch]:
        return [item.batch for item in items] if self._columnar else [from_records(partition, items)]

    def position(self, partition: int) -> int:
        """Offset of the next record that `poll` will hand out."""
        return int(self._kafka._subscription.assignment[TopicPartition(self.topic, partition)].position.offset)

    def lag(self) -> dict[int, int]:
        """Records between the position and the end known from the last answer, by partition; asks nobody."""
        lags = {}
        for at in self._kafka.assignment():
            end = self._kafka.highwater(at)
            end = self._ends[at.partition] if end is None else end
            lags[at.partition] = max(0, end - self.position(at.partition))
        return lags

    def end_offsets(self) -> dict[int, int]:
        """The end of each partition as the broker says now.

        Raises:
            KafkaError: the broker did not answer in time.
        """
        return {at.partition: end for at, end in self._kafka.end_offsets(list(self._kafka.assignment())).items()}

    def foreign(self) -> dict[int, tuple[OffsetAndMetadata | None, int]]:
        """What is committed of each partition that was not assigned, and its end.

        Raises:
            KafkaError: the broker did not answer in time.
        """
        numbers = self._kafka.partitions_for_topic(self.topic) or ()
        others = {TopicPartition(self.topic, number) for number in numbers} - self._kafka.assignment()
        ends = self._kafka.end_offsets(list(others)) if others else {}
        return {at.partition: (self._kafka.committed(at, metadata=True), int(end)) for at, end in ends.items()}

    def commit(self, offsets: Mapping[int, int]) -> None:
        """Report offsets to Kafka without waiting; a failure is not an error, because checkpoints decide."""
        reported = {TopicPartition(self.topic, at): OffsetAndMetadata(offset, "", -1) for at, offset in offsets.items()}
        self._reported |= reported
        self._kafka.commit_async(reported)

    def close(self) -> None:
        """Leave the broker."""
        try:
            held = self._kafka.assignment()
            if reported := {at: offset for at, offset in self._reported.items() if at in held}:
                self._kafka.commit(reported, timeout_ms=2_000)  # the last report may still be under way
            self._kafka.close(autocommit=False, timeout_ms=2_000)
        except KafkaError as error:
            log.debug("closing the consumer failed: %s", error)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Looking for cycles among kafka-python's records, which have none, takes a third of the time to read them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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


def _packed(batches: Sequence[RecordBatch], max_records: int) -> Iterator[RecordBatch]:
    """Neighbouring small batches of one partition joined up to `max_records`; large ones are not worth the copying."""
    group: list[RecordBatch] = []
    size = 0
    for batch in batches:
        if group and (max(size, len(batch.offsets)) >= LARGE_BATCH or size + len(batch.offsets) > max_records):
            yield _joined(group)
            group, size = [], 0
        group.append(batch)
        size += len(batch.offsets)
    if group:
        yield _joined(group)


def _joined(batches: Sequence[RecordBatch]) -> RecordBatch:
    if len(batches) == 1:
        return batches[0]
    starts = np.cumsum([0, *(len(batch.buffer) for batch in batches[:-1])])

    def shifted(spans: Iterable[Ints]) -> Ints:
        moved = [np.where(span >= 0, span + start, span) for span, start in zip(spans, starts, strict=True)]
        return np.concatenate(moved)

    return RecordBatch(
        batches[0].partition,
        np.concatenate([batch.buffer for batch in batches]),
        np.concatenate([batch.offsets for batch in batches]),
        shifted(batch.keys for batch in batches),
        shifted(batch.values for batch in batches),
        np.concatenate([batch.timestamps_ms for batch in batches]),
    )


def _pieces(batch: RecordBatch, max_records: int) -> Iterator[RecordBatch]:
    for start in range(0, len(batch.offsets), max_records):
        yield batch.rows(slice(start, start + max_records))


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
