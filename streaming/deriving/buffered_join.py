"""What joins of two streams have in common: events wait in buffers, and the lesser clock of both lets them go."""

from abc import ABC, abstractmethod
from typing import Any, Self

import numpy as np

from streaming.derived import Derived
from streaming.deriving.derivation import Derivation
from streaming.deriving.join_buffer import Buffers
from streaming.deriving.join_clock import JoinClock
from streaming.deriving.join_input import FUTURE, LeftInput, RightInput, refused
from streaming.deriving.join_rows import Arrived
from streaming.records import Bools, Ints, RecordBatch
from streaming.state import StateError, pack, unpack
from streaming.windows import NEVER_US

HELD_BYTES = 64 << 20


class BufferedJoin(ABC):
    """The join of one partition of each side, 0 the left and 1 the right.

    What it gives depends on the records of both sides, on their order, and on the wall clock at a tick; not on how they
    come in batches, nor on snapshots.

    Args:
        derivation: What is joined.

    Raises:
        PlanError: It cannot be.
    """

    def __init__(self, derivation: Derivation) -> None:
        left, right = derivation.inputs
        self._derivation = derivation
        self._right = RightInput(right, derivation.on)
        self._inputs = (LeftInput(left, derivation.on, derivation.key), self._right)
        self._clock = JoinClock((left.delay_us, right.delay_us))
        self._buffers = Buffers((self._waits, False), (self._left_found, True))

    @property
    def clocks_us(self) -> tuple[int, ...]:
        """The greatest event time of each side, gone on with the wall clock while it was idle."""
        return tuple(self._clock.times_us.tolist())

    @property
    def buffered_bytes(self) -> int:
        """Memory that the events of both sides take."""
        return self._buffers.nbytes

    def process(self, side: int, batch: RecordBatch, now_us: int) -> Derived:
        """Takes records of one side in offset order and gives what they complete, in the order of these."""
        events, unread = self._inputs[side].read(batch)
        arrived = self._buffers.arrive(side, events, now_us)
        verdicts, than_us = np.zeros((2, len(batch.offsets)), dtype=np.int64)
        derived = self._derived(self._take(side, arrived, verdicts, than_us))
        if (events.readable & (verdicts != FUTURE)).any():
            self._clock.heard(side, now_us)
        rejects = refused(batch, events.times, verdicts, than_us, unread)
        return derived._replace(rejects=[(side, reject) for reject in rejects])

    def tick(self, now_us: int, side: int) -> Derived:
        """Lets the clock of a side that is read to its end follow the wall clock.

        Where more than 64 MiB wait beyond the watermark, the side catches up with the other one at once, so that a
        replayed stream does not wait in memory for another that has ended.
        """
        full = self.buffered_bytes > HELD_BYTES and self._buffers.bytes_after(self._clock.mark_us) > HELD_BYTES
        self._clock.tick(now_us, side, full)
        return self._derived(self._release(self._clock.mark_us))

    def leave_out(self, side: int, wall_us: int) -> None:
        """Lets `tick` not count a step of the wall clock since the last event of a side."""
        self._clock.leave_out(side, wall_us)

    def drain(self) -> Derived:
        """Gives what waits, because nothing more will come."""
        derived = self._derived(self._release(NEVER_US))
        left, right = self._kept()
        self._buffers.compact((left & (not self._waits), right))
        return derived

    def snapshot(self) -> bytes:
        """The state, for `restore`; equal histories give equal bytes."""
        self._forget()
        return pack(self._header(), self._buffers.state())

    def delta(self) -> bytes | None:
        """What has changed since the last snapshot or delta, for `restore`; None where events were forgotten since."""
        arrays = self._buffers.added()
        return None if arrays is None else pack(self._header(), arrays)

    @classmethod
    def restore(cls, derivation: Derivation, snapshot: bytes, *deltas: bytes) -> Self:
        """The join that gave a snapshot and then deltas.

        Raises:
            StateError: They are of another declaration or version, or cut short.
        """
        restored = cls(derivation)
        buffers = restored._buffers
        for number, data in enumerate((snapshot, *deltas)):
            header, arrays = unpack(data)
            if header["fingerprint"] != derivation.fingerprint:
                raise StateError(
                    f"The state of '{derivation.name}' was made by another declaration of it: start anew with --reset"
                    f" {derivation.name}, which keeps the checkpoint aside."
                )
            restored._clock.restore(header["clock"])
            (buffers.extend if number else buffers.restore)(arrays)
        if deltas:
            restored._forget()
        return restored

    def _header(self) -> dict[str, Any]:
        return {"fingerprint": self._derivation.fingerprint, "clock": self._clock.state()}

    @property
    @abstractmethod
    def _waits(self) -> bool:
        """Whether left events wait for the watermark."""

    @property
    @abstractmethod
    def _left_found(self) -> bool:
        """Whether left events are found by right ones."""

    @abstractmethod
    def _take(self, side: int, arrived: Arrived, verdicts: Ints, than_us: Ints) -> Ints:
        """Takes records and judges them; gives the pairs of rows [M, 2] that come out."""

    @abstractmethod
    def _release(self, mark_us: int) -> Ints:
        """The pairs that come out when the watermark has risen to this."""

    @abstractmethod
    def _kept(self) -> tuple[Bools, Bools]:
        """Which rows of each side are still needed."""

    @abstractmethod
    def _needless(self) -> int:
        """How many rows at least are not."""

    def _derived(self, pairs: Ints) -> Derived:
        keys, values = self._buffers.write(pairs, self._right.nulls)
        if self._buffers.crowded(self._needless()):
            self._forget()
        return Derived(keys, values, [])

    def _forget(self) -> None:
        self._buffers.compact(self._kept())
