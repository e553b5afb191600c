"""Records that make the computation itself raise: found by bisection, dead-lettered alone, and the rest goes on.

Two ways, by whether the failing attempt has left a trace in the partition. A partition decodes and transforms all
records of a batch before it changes any state, so an error of those leaves none and the batch is halved in place. After
any other error the partition is given up; its owner restores it from its checkpoint and, as far as the failing batch
reached, tries every batch on copies first.
"""

import logging
from collections.abc import Iterator

import numpy as np

from streaming.partition import Partition
from streaming.records import RecordBatch, Reject
from streaming.state import StateError

log = logging.getLogger(__name__)

NOT_OF_A_RECORD = (MemoryError, StateError)


class SpoiledError(RuntimeError):
    """A partition raised after it had begun to change: it must be restored."""


def feed(partition: Partition, batch: RecordBatch, now_us: int) -> Iterator[list[Reject]]:
    """The `pieces` of a batch, without the records that make them raise: those are among the refused ones.

    Raises:
        SpoiledError: the partition raised and is not as it was.
        MemoryError, StateError: no record's fault.
    """
    waiting = [batch]
    while waiting:
        part = waiting.pop()
        before = _figures(partition)
        try:
            yield from partition.pieces(part, now_us)
            continue
        except NOT_OF_A_RECORD:
            raise
        except Exception as error:
            if _figures(partition) != before:
                raise SpoiledError(f"Partition {partition.partition} raised half-way: {error!r}") from error
            failure = error
        middle = len(part.offsets) // 2
        if middle:
            waiting += [part.rows(slice(middle, None)), part.rows(slice(middle))]
        else:
            yield from without(partition, part, now_us, {int(part.offsets[0]): failure})


def without(
    partition: Partition, batch: RecordBatch, now_us: int, poison: dict[int, Exception]
) -> Iterator[list[Reject]]:
    """The `pieces` of a batch in which the records of some offsets are dead, each with its error as the reason."""
    at = {int(batch.offsets[row]): row for row in np.flatnonzero(np.isin(batch.offsets, list(poison))).tolist()}
    for offset in at:
        log.error(
            "a record made the computation raise and is dead-lettered",
            extra={"partition": partition.partition, "offset": offset, "error": repr(poison[offset])},
        )
    for refused in partition.pieces(_blanked(batch, list(poison)), now_us):
        yield [
            reject
            if reject.offset not in at
            else reject._replace(reason=_reason(poison[reject.offset]), value=batch.value(at[reject.offset]))
            for reject in refused
        ]


def poisonous(partition: Partition, batch: RecordBatch, now_us: int) -> dict[int, Exception]:
    """Offset to error of the records that make a partition raise, tried on copies of it.

    Raises:
        MemoryError, StateError: no record's fault.
        Exception: what the partition raises also without any record's value.
    """
    state = partition.snapshot()

    def failure(rows: int, dead: list[int]) -> Exception | None:
        copy = type(partition).restore(partition.plan, partition.partition, state)
        try:
            copy.process(_blanked(batch.rows(slice(rows)), dead), now_us)
        except NOT_OF_A_RECORD:
            raise
        except Exception as error:
            return error
        return None

    found: dict[int, Exception] = {}
    good, count = 0, len(batch.offsets)
    while (error := failure(count, list(found))) is not None:
        bad = count
        while bad - good > 1:
            middle = (good + bad) // 2
            if (tried := failure(middle, list(found))) is None:
                good = middle
            else:
                bad, error = middle, tried
        offset = int(batch.offsets[bad - 1])
        if offset in found:
            raise error
        found[offset] = error
    return found


def _figures(partition: Partition) -> tuple[object, ...]:
    return partition.next_offset, partition.clock_us, partition.counters, partition.learning


def _reason(error: Exception) -> str:
    return f"made the computation raise {type(error).__name__}: {error}"


def _blanked(batch: RecordBatch, offsets: list[int]) -> RecordBatch:
    """The batch with null values at some offsets."""
    if not offsets:
        return batch
    values = batch.values.copy()
    values[np.isin(batch.offsets, offsets)] = -1
    return batch._replace(values=values)
