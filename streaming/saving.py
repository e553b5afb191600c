"""The slow half of a checkpoint, beside the loop: offline part, state file, durable one after the other.

The loop captures what a checkpoint holds as bytes, after the rejects and the online rows of everything in it were
written; a thread of its own does the rest while the loop goes on. One job at a time: what comes meanwhile waits for the
next one, and the loop polls nothing when too much waits.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures import wait as wait_for
from typing import NamedTuple, Protocol

from streaming.checkpoint import CheckpointStore, StaleEpochError
from streaming.holding import Offline
from streaming.records import Emission

log = logging.getLogger(__name__)

COMPACT_S = 60.0


class SavingError(OSError):
    """Offline part or checkpoint could not be written; it will be tried again, and the loop may go on meanwhile."""


class Syncing(Protocol):
    """What saving needs of an online sink; called from another thread than `write`."""

    def sync(self) -> None: ...  # noqa: D102


class Captured(NamedTuple):
    """A partition as it was between two steps of the loop.

    Attributes:
        partition: Its number in Kafka.
        epoch: Of its owner.
        first_offset: Of the first record after the checkpoint before.
        next_offset: Of the first record that is not in it.
        clock_us: Event time of the partition.
        rows: What was emitted since the checkpoint before, each with the wall clock at which it was made.
        state: The whole state, or what changed since the checkpoint before.
        delta: Which of the two.
    """

    partition: int
    epoch: int
    first_offset: int
    next_offset: int
    clock_us: int
    rows: list[tuple[Emission, int]]
    state: bytes
    delta: bool


class Saved(NamedTuple):
    """What a job has done.

    Attributes:
        offsets: Partition to next offset of its new checkpoint.
        lost: Partitions that a newer owner has taken, with its words.
        seconds: How long the job took.
    """

    offsets: dict[int, int]
    lost: dict[int, StaleEpochError]
    seconds: float


class Saver:
    """Writes captured partitions in the background.

    Args:
        stream: Name of what is computed.
        online: Made durable before the first checkpoint of a job.
        offline: Takes the rows.
        checkpoints: Takes the states.
        executor: Runs a job; one thread is enough.
        monotonic_s: Clock for intervals.
    """

    def __init__(
        self,
        stream: str,
        *,
        online: Syncing,
        offline: Offline,
        checkpoints: CheckpointStore,
        executor: Executor,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._online, self._offline, self._checkpoints = stream, online, offline, checkpoints
        self._executor, self._monotonic_s = executor, monotonic_s
        self._waiting: deque[Captured] = deque()
        self._running: Future[float] | None = None
        self._offsets: dict[int, int] = {}
        self._lost: dict[int, StaleEpochError] = {}
        self._wholes: dict[int, deque[tuple[int, int]]] = {}
        self._compacted_s: dict[int, float] = {}

    @property
    def busy(self) -> bool:
        """Whether there is a job that was not collected as done."""
        return self._running is not None or bool(self._waiting)

    def begin(self, captured: Sequence[Captured]) -> None:
        """Start a job; only while not `busy`."""
        self._waiting.extend(captured)
        self._offsets, self._lost = {}, {}
        self._submit()

    def collect(self, wait_s: float = 0.0) -> Saved | None:
        """What the job has done when it has ended; None while it goes on, or when there is none.

        Args:
            wait_s: how long to wait for its end.

        Raises:
            OSError: it failed; the job is kept and the next call starts it again where it stood.
        """
        if self._running is None:
            if not self._waiting:
                return None
            self._submit()
        running = self._running
        if running is None or not wait_for([running], wait_s).done:
            return None
        self._running = None
        return Saved(self._offsets, self._lost, running.result())

    def _submit(self) -> None:
        self._running = self._executor.submit(self._save)

    def _save(self) -> float:
        began_s = self._monotonic_s()
        self._online.sync()
        while self._waiting:
            one = self._waiting[0]
            try:
                self._checkpoints.check(self._stream, one.partition, one.epoch)
                self._offline.write(one.partition, one.first_offset, one.next_offset, one.clock_us, one.rows)
                self._checkpoints.save(
                    self._stream, one.partition, one.epoch, one.next_offset, one.clock_us, one.state, one.delta
                )
                self._offsets[one.partition] = one.next_offset
                self._compact(one)
            except StaleEpochError as error:
                self._lost[one.partition] = error
            self._waiting.popleft()
        return self._monotonic_s() - began_s

    def _compact(self, saved: Captured) -> None:
        """Merges offline parts now and then, up to the older of the last two whole states: none before is restored."""
        wholes = self._wholes.setdefault(saved.partition, deque(maxlen=2))
        if not saved.delta:
            wholes.append((saved.next_offset, saved.clock_us))
        now_s = self._monotonic_s()
        last_s = self._compacted_s.setdefault(saved.partition, now_s)
        if len(wholes) < 2 or now_s - last_s < COMPACT_S:
            return
        self._compacted_s[saved.partition] = now_s
        try:
            self._offline.compact(saved.partition, *wholes[0])
        except OSError as error:
            log.warning("offline parts not merged", extra={"partition": saved.partition, "error": repr(error)})
