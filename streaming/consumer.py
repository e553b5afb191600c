"""The Kafka consumer of a worker: chosen partitions from given offsets, in `RecordBatch`es of columns."""

import gc
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import kafka
import numpy as np
from kafka import KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka.errors import KafkaError, LogTruncationError, OffsetOutOfRangeError

from streaming.records import Ints, RecordBatch
from streaming.wire import ColumnarRecords, from_records

log = logging.getLogger(__name__)

KNOWN_VERSIONS = ("3.0.",)
BATCHES_A_POLL = 32
LARGE_BATCH = 4_096
ANSWER_S = 2.0


class OffsetError(ValueError):
    """What was read of a topic is no longer there: the topic was deleted and made again, or a broker lost records."""


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
        self._heard: dict[int, tuple[float, float]] = {}  # when the last answer came, and seconds without one before
        known = kafka.__version__.startswith(KNOWN_VERSIONS)
        self._columnar = columnar and known
        if known:
            self._listen()
        else:
            log.warning(
                "kafka-python %s was not tried: reading is slower, and a broker that is away goes for silence",
                kafka.__version__,
            )
        if self._columnar:
            self._kafka._fetcher.PartitionRecords = ColumnarRecords

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
                " the topic was deleted and made again; start its views anew with --reset."
            )
        if start < earliest:
            self.lost[partition] = self.lost.get(partition, 0) + earliest - start
            log.warning(
                "records removed by retention before they were read",
                extra={"topic": self.topic, "partition": partition, "offset": start, "lost": earliest - start},
            )
        self._heard[partition] = time.monotonic(), self._heard.get(partition, (0.0, 0.0))[1]
        self._kafka.seek(at, max(start, earliest))
        return max(start, earliest)

    def hold(self, partitions: Iterable[int]) -> None:
        """Let `poll` hand out nothing of these partitions, and of all others again what comes."""
        held = {TopicPartition(self.topic, partition) for partition in partitions}
        paused = self._kafka.paused()
        self._answered(held - paused)
        for at in paused:  # nobody asked
            self._heard[at.partition] = time.monotonic(), self._heard[at.partition][1]
        self._kafka.resume(*(paused - held))
        self._kafka.pause(*held)

    def poll(self, timeout_s: float, max_records: int) -> list[RecordBatch]:
        """Batches of at most `max_records` records, each of one partition, in offset order within a partition.

        Empty when nothing came within `timeout_s` or while the broker is away (kafka-python reconnects by itself).

        Raises:
            OffsetError: the topic was deleted and made again while it was read, or a broker lost what was read.
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
        except LogTruncationError as error:
            at = min(error.divergent_offsets)
            raise OffsetError(
                f"Topic {self.topic!r} partition {at.partition} no longer holds what was read of it up to offset"
                f" {self.position(at.partition)}: the topic was deleted and made again, or a broker lost records;"
                " start its views anew with --reset."
            ) from error
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

    def unanswered_s(self) -> dict[int, float]:
        """Seconds in which the broker said nothing of each partition since it was first taken; asks nobody.

        It answers twice a second also where it has nothing, so only pauses above two seconds count. A partition on hold
        is not asked for, and while nobody polls none is: that counts as no answer.
        """
        now_s, paused = time.monotonic(), self._kafka.paused()
        found = {}
        for at in self._kafka.assignment():
            heard_s, before_s = self._heard.get(at.partition, (now_s, 0.0))
            found[at.partition] = before_s + (0.0 if at in paused else _pause_s(heard_s, now_s))
        return found

    def _listen(self) -> None:
        """Have every fetch that is answered noted; the answer names only partitions of which there is news."""
        fetcher = self._kafka._fetcher
        handle = fetcher._handle_fetch_response

        def handled(node: Any, offsets: Mapping[TopicPartition, int], sent_s: float, response: Any) -> None:
            handle(node, offsets, sent_s, response)
            if not response.error_code:
                refused = {
                    TopicPartition(topic.topic, one.partition_index)
                    for topic in response.responses
                    for one in topic.partitions
                    if one.error_code
                }
                self._answered(offsets.keys() - refused)

        fetcher._handle_fetch_response = handled

    def _answered(self, partitions: Iterable[TopicPartition]) -> None:
        """Note that the broker spoke of these; called by the thread of kafka-python, so each note is one assignment."""
        now_s = time.monotonic()
        for at in partitions:
            heard_s, before_s = self._heard.get(at.partition, (now_s, 0.0))
            self._heard[at.partition] = now_s, before_s + _pause_s(heard_s, now_s)

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


def _pause_s(heard_s: float, now_s: float) -> float:
    return now_s - heard_s if now_s - heard_s > ANSWER_S else 0.0


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
