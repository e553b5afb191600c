"""A derived topic's writer: one transactional producer for each input partition, which fences those before it.

A transaction holds derived records and the input offsets that they account for, as offsets of the consumer group
`millrace-<name>`. The group's metadata of the left input also holds the number of the transaction and the counts, so
that after a crash the broker alone says what has happened.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from kafka import KafkaConsumer, KafkaProducer, OffsetAndMetadata, TopicPartition
from kafka.errors import KafkaError

from streaming.deriving.derivation import Derivation
from streaming.producing.columns import from_rows
from streaming.producing.delivery import deliver, takes_batches
from streaming.producing.encode import encode
from streaming.producing.producer import TIMEOUT_MS, Message, connect, send

log = logging.getLogger(__name__)

TRANSACTION_MS = 60_000
RETRY_MS = 10
NO_EVENT_US = -(1 << 63)


@dataclass(frozen=True)
class Progress:
    """What a derivation has done of a partition, up to one of its transactions.

    Attributes:
        number: Of the transaction; they are counted from 1.
        offsets: Next offset of each side's input.
        fingerprint: Of the derivation.
        stateful: Whether a checkpoint of this number belongs to it.
        processed: Records that were read.
        dead: Those of them that could not be read.
        late: Those that came too late.
        written: Records of the derived topic.
        epoch: Of the owner that committed it.
        clock_us: No record of the left input is still to come whose time is more than its delay below this.
    """

    number: int
    offsets: tuple[int, ...]
    fingerprint: str
    stateful: bool = False
    processed: int = 0
    dead: int = 0
    late: int = 0
    written: int = 0
    epoch: int = 0
    clock_us: int = NO_EVENT_US


class Transactions:
    """Writes what one partition of the inputs gives; not for several threads at a time.

    Args:
        derivation: what is computed.
        partition: of the inputs.
    """

    def __init__(self, derivation: Derivation, partition: int) -> None:
        self._topic, self._group = derivation.name, group(derivation)
        self._servers = derivation.bootstrap_servers
        self._inputs = [TopicPartition(each.topic, partition) for each in derivation.inputs]
        self._id = f"millrace-{derivation.name}-{partition}"
        self._producer: KafkaProducer | None = None

    def take(self) -> Progress | None:
        """Fence every writer before this one, end what it left open, and say what was committed last; None: nothing.

        Raises:
            KafkaError: the broker did not answer in time; call again.
        """
        self.close()
        self._producer = connect(
            self._servers, transactional_id=self._id, transaction_timeout_ms=TRANSACTION_MS, retry_backoff_ms=RETRY_MS
        )
        self._producer.init_transactions()
        consumer = KafkaConsumer(
            bootstrap_servers=self._servers.split(","),
            group_id=self._group,
            isolation_level="read_committed",  # waits for offsets of a transaction that is just ending
            enable_auto_commit=False,
        )
        try:
            found = [consumer.committed(at, metadata=True, timeout_ms=TIMEOUT_MS) for at in self._inputs]
        finally:
            consumer.close(autocommit=False, timeout_ms=2_000)
        if not all(found):
            return None
        return progress_of(found)

    def write(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """Begin a transaction and wait until the broker has these records, each in the partition of its key.

        Raises:
            KafkaError: it may have some of them; `take` before the next try.
        """
        producer = self._taken()
        producer.begin_transaction()
        if not keys:
            return
        partitions = len(producer.partitions_for(self._topic))
        if not takes_batches():
            send(producer, [Message(self._topic, key, value) for key, value in zip(keys, values, strict=True)])
            return
        events = from_rows([0] * len(keys), keys, values)
        deliveries = [deliver(producer, self._topic, batch) for batch in encode(events, [partitions])]
        for delivery in deliveries:
            delivery.wait(TIMEOUT_MS / 1000)

    def commit(self, progress: Progress) -> None:
        """End the transaction: its records and this progress are there for everybody, or neither is.

        Raises:
            KafkaError: either of both; `take` says which.
        """
        note = asdict(progress)
        del note["offsets"]
        notes = [json.dumps(note), *[""] * (len(self._inputs) - 1)]
        producer = self._taken()
        producer.send_offsets_to_transaction(
            {
                at: OffsetAndMetadata(offset, text, -1)
                for at, offset, text in zip(self._inputs, progress.offsets, notes, strict=True)
            },
            self._group,
        )
        producer.commit_transaction()

    def close(self) -> None:
        """Leave the broker; a transaction that is open is ended by the next `take`, or by the broker in a minute."""
        if self._producer is not None:
            try:
                self._producer.close(timeout=2)
            except KafkaError as error:
                log.debug("closing the producer failed: %s", error)
            self._producer = None

    def _taken(self) -> KafkaProducer:
        if self._producer is None:
            raise KafkaError("the derived topic was not taken")
        return self._producer


def progress_of(found: Sequence[OffsetAndMetadata]) -> Progress:
    """What was committed, of the offsets of all sides."""
    return Progress(offsets=tuple(each.offset for each in found), **json.loads(found[0].metadata))


def group(derivation: Derivation) -> str:
    """The consumer group whose offsets say how far a derivation is."""
    return f"millrace-{derivation.name}"
