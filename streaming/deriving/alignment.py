"""Partitions read side by side in event time, where their events meet in one partition of what is derived.

A reader of the derived topic has one clock for what came from several partitions. So none of them may run ahead of the
slowest by more than the drift that the declaration allows, and that the watermark of the derived source waits for. What
counts is how far a partition is committed, since only that has its place in the derived topic; other workers read it
from the consumer group. A partition that has been read to its end holds nobody up.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from kafka import OffsetAndMetadata

from streaming.ddl import INTEGERS, read_schema
from streaming.decode import Decoder
from streaming.deriving.derivation import Derivation
from streaming.deriving.transactions import NO_EVENT_US, progress_of
from streaming.plan import FUTURE_US, Plan
from streaming.records import Ints, RecordBatch
from streaming.windows import NEVER_US

LOOK_S = (0.1, 1.0)


class Foreign(Protocol):
    """What alignment needs of the consumer of the left input (`consumer.Consumer`)."""

    def foreign(self) -> Mapping[int, tuple[OffsetAndMetadata | None, int]]: ...  # noqa: D102


class Standing(NamedTuple):
    """A partition that has more to read: how far it is, and whether all that it gave has its place already."""

    clock_us: int
    next_us: int
    settled: bool

    @property
    def low_us(self) -> int:
        """No time below this (but for the delay) is still to come from it."""
        return self.next_us if self.settled else self.clock_us


class Alignment:
    """How far each partition may be read.

    Attributes:
        alone: Whether this worker had all partitions when it was last looked.

    Args:
        derivation: what is derived.
        source: of its left input.
        monotonic_s: clock for intervals.
    """

    def __init__(self, derivation: Derivation, source: Foreign, monotonic_s: Callable[[], float]) -> None:
        left = derivation.inputs[0]
        entity = derivation.on or derivation.key
        kind = read_schema(f"Derived topic {derivation.name!r}", left.schema)[entity][0]
        plan = Plan(
            derivation.name,
            left.topic,
            left.bootstrap_servers,
            entity,
            "int64" if kind in INTEGERS else "string",
            left.timestamp,
            (),
            (),
            left.delay_us,
        )
        self._decoder, self._source, self._drift_us = Decoder(plan), source, derivation.drift_us
        self._monotonic_s = monotonic_s
        self._looked_s = -LOOK_S[1]
        self._others: dict[int, int] = {}
        self.alone = True

    def times_us(self, batch: RecordBatch, now_us: int) -> Ints:
        """[N] the greatest event time so far in the batch; records without one, or of the future, have none."""
        columns, _ = self._decoder.decode(batch)
        usable = columns.readable & (columns.times <= now_us + FUTURE_US)
        return np.maximum.accumulate(np.where(usable, columns.times, NO_EVENT_US))

    def limits_us(self, standings: Mapping[int, Standing], numbers: Sequence[int]) -> dict[int, int]:
        """The greatest event time that may be read of each of these partitions now.

        Args:
            standings: of this worker's partitions that have more to read.
            numbers: the partitions.

        Raises:
            KafkaError: the broker did not say how far other workers are.
        """
        since_s = self._monotonic_s() - self._looked_s
        if since_s >= LOOK_S[1]:
            self._look()
        limits = self._limits_us(standings, numbers)
        if (
            since_s >= LOOK_S[0]
            and self._others
            and any(standings[number].next_us > limits[number] for number in numbers if number in standings)
        ):
            self._look()
            limits = self._limits_us(standings, numbers)
        return limits

    def _limits_us(self, standings: Mapping[int, Standing], numbers: Sequence[int]) -> dict[int, int]:
        others_us = min(self._others.values(), default=NEVER_US)
        limits = {}
        for number in numbers:
            low_us = min((one.low_us for at, one in standings.items() if at != number), default=NEVER_US)
            limits[number] = min(low_us, others_us) + self._drift_us
        return limits

    def _look(self) -> None:
        self._looked_s = self._monotonic_s()
        found = self._source.foreign()
        self.alone = not found
        self._others = {
            number: progress_of([committed]).clock_us if committed else NO_EVENT_US
            for number, (committed, end) in found.items()
            if end > (committed.offset if committed else 0)
        }
