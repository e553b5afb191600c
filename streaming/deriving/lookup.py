"""What look-ups have in common: each event comes out once, in order, with fields found by its key; nothing waits."""

from abc import ABC, abstractmethod

import numpy as np

from streaming.derived import Derived
from streaming.deriving.derivation import Derivation
from streaming.deriving.join_input import FUTURE, READ, Events, LeftInput, refused
from streaming.deriving.raw_json import NO_SPAN, NO_TEXT, joined
from streaming.deriving.stateless import Stateless
from streaming.plan import FUTURE_US
from streaming.records import Bytes, Ints, RecordBatch
from streaming.windows import NEVER_US


class Lookup(Stateless, ABC):
    """A look-up for the events of one partition.

    Args:
        derivation: What is looked up.

    Raises:
        PlanError: It cannot be.
    """

    def __init__(self, derivation: Derivation) -> None:
        self._left = LeftInput(derivation.inputs[0], derivation.on, derivation.key)
        self._clock_us = -NEVER_US

    @property
    def clocks_us(self) -> tuple[int, ...]:
        """The greatest event time."""
        return (self._clock_us,)

    def process(self, side: int, batch: RecordBatch, now_us: int) -> Derived:
        """The events with what was found for them.

        Raises:
            OSError: What is looked up is away; nothing has changed, and the same records can be given again.
        """
        events, unread = self._left.read(batch)
        future = events.readable & (events.times > now_us + FUTURE_US)
        events = events._replace(readable=events.readable & ~future)
        rows = np.flatnonzero(events.readable)
        tails, spans, nulls = self._find(events, now_us)
        nothing = np.full((len(rows), 2), NO_SPAN, dtype=np.int64)
        keys = joined(events.keys_text, events.keys[rows], NO_TEXT, nothing, NO_TEXT)
        values = joined(events.body, events.bodies[rows], tails, spans[rows], nulls)
        self._clock_us = max(self._clock_us, int(events.times[rows].max(initial=-NEVER_US)))
        verdicts = np.where(future, FUTURE, READ)
        rejects = refused(batch, events.times, verdicts, np.full(len(verdicts), now_us), unread)
        return Derived(keys, values, [(side, reject) for reject in rejects])

    @abstractmethod
    def _find(self, events: Events, now_us: int) -> tuple[Bytes, Ints, Bytes]:
        """What follows on each of N readable events: text, spans [N, 2] or -1, and what stands where there is none."""
