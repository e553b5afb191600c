"""Ready record batches on their way through kafka-python's producer: its threads, retries and idempotence, our bytes.

A producer takes one record at a time; what it queues are batches. Here finished batches join its queue: the place is
private (`RecordAccumulator._batches`), so it is used only with the versions that were tried, and `produce` sends
record by record with others. A batch gets its producer's number and sequence when the producer takes it from the
queue, as its own do; a retry sends the same bytes again, so the broker stores each batch once.
"""

import threading
from collections.abc import Callable
from typing import Any

import kafka
from kafka import KafkaProducer, TopicPartition
from kafka.errors import KafkaTimeoutError
from kafka.producer.producer_batch import ProducerBatch

from streaming.producing.encode import Batch

TRIED_VERSIONS = ("3.0.",)


def takes_batches() -> bool:
    """Whether this version of kafka-python was tried with ready batches."""
    return bool(kafka.__version__.startswith(TRIED_VERSIONS))


class Delivery:
    """The outcome of one batch, also if the producer cuts it because the broker finds it too large.

    A cut batch is never answered, its pieces are: records are bound to what will be answered for them, and the batch
    is delivered when as many as it holds have been.
    """

    def __init__(self, batch: Batch, produced: Any) -> None:
        self.raw_bytes = batch.raw_bytes
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._missing = batch.records
        self._bound: dict[Any, int] = {}
        self._bind(produced, batch.records)

    def rebind(self, produced: Any, index: int) -> None:
        """Called by the producer's thread for each record of a batch that it cuts, with the outcome of its piece."""
        self._bind(produced, 1)

    def wait(self, timeout_s: float) -> None:
        """Return when the broker has acknowledged all of it.

        Raises:
            KafkaError: it refused, or said nothing in time.
        """
        if not self._done.wait(timeout_s):
            raise KafkaTimeoutError(f"no acknowledgement in {timeout_s:.0f} s")
        if self._error is not None:
            raise self._error

    def _bind(self, produced: Any, records: int) -> None:
        if produced not in self._bound:
            self._bound[produced] = 0
            produced.add_callback(self._answered, produced)
            produced.add_errback(self._failed)
        self._bound[produced] += records

    def _answered(self, produced: Any, result: tuple[int, int, Callable[[int], BaseException] | None]) -> None:
        failure = result[2]  # kafka-python resolves a failed batch too with success, and with a function to its errors
        if failure is not None:
            self._failed(failure(0))
            return
        self._missing -= self._bound[produced]
        if not self._missing:
            self._done.set()

    def _failed(self, error: BaseException) -> None:
        self._error = error
        self._done.set()


class _Records:
    """What kafka-python asks of the records of a batch in its queue (its MemoryRecordsBuilder)."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._closed = self._transactional = False
        self.producer_id = self.producer_epoch = self.base_sequence = -1

    def set_producer_state(self, producer_id: int, epoch: int, base_sequence: int, transactional: bool) -> None:
        """Remember what `close` writes into the header."""
        self.producer_id, self.producer_epoch, self.base_sequence = producer_id, epoch, base_sequence
        self._transactional = transactional

    def close(self) -> None:
        """Make the bytes final; a retry closes again and changes nothing."""
        if not self._closed:
            self._batch.sign(self.producer_id, self.producer_epoch, self.base_sequence, self._transactional)
            self._closed = True

    def buffer(self) -> bytearray:
        return self._batch.data

    def size_in_bytes(self) -> int:
        return len(self._batch.data)

    def compression_rate(self) -> float:
        return len(self._batch.data) / self._batch.raw_bytes

    def is_full(self) -> bool:
        return True

    def append(self, *_: object) -> None:
        """No room for another record."""

    def next_offset(self) -> int:
        return self._batch.records


def deliver(producer: KafkaProducer, topic: str, batch: Batch) -> Delivery:
    """Queue a batch, in the transaction that the producer is in if it is transactional; leave it alone afterwards.

    Raises:
        KafkaError: the producer is not in a transaction, or in one that has failed.
    """
    at = TopicPartition(topic, batch.partition)
    transactions = producer._transaction_manager
    if transactions is not None and transactions.is_transactional():
        transactions.maybe_add_partition_to_transaction(at)
    queued = ProducerBatch(at, _Records(batch))
    delivery = Delivery(batch, queued.produce_future)
    queued._record_futures = [delivery] * batch.records
    accumulator = producer._accumulator
    accumulator._incomplete.add(queued)
    with accumulator._tp_lock(at):
        accumulator._batches[at].append(queued)
    producer._sender.wakeup()
    return delivery
