"""One partition of a derivation: its operator, what waits to be derived, and what was derived since the last commit."""

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
from kafka.errors import KafkaError

from streaming.derived import Derived, Operator
from streaming.deriving.alignment import Standing
from streaming.deriving.commits import Commit, Commits
from streaming.deriving.derivation import Derivation
from streaming.deriving.transactions import Progress
from streaming.holding import DATED_US
from streaming.records import Ints, RecordBatch, Reject
from streaming.silence import Silence
from streaming.windows import NEVER_US

log = logging.getLogger(__name__)

COMMIT_S = 0.1
SNAPSHOT_SHARE = 10
IDLE_S = 1.0
SETTLE_S = 300.0  # what producers hold while their broker is away, they deliver by then or give up
KEEP_S = 6 * 3600.0  # a broker forgets offsets that are not committed again
PAUSE_S = (0.2, 5.0)


class Waiting(NamedTuple):
    """A batch that was read; `times_us` [N] rise, and are None where it need not wait for other partitions."""

    side: int
    batch: RecordBatch
    times_us: Ints | None


@dataclass
class DerivedPartition:
    """What a worker holds of a partition.

    Attributes:
        derivation: What is computed.
        operator: Computes it.
        commits: Take what it gives.
        progress: Of the last commit.
        offsets: Next one of each side.
        clock_us: Event time of the left input, as far as it was derived.
        restored: Records that had been read before.
        began_s: When the last commit began.
        heard_s: When each side had its last records.
        silences: Of each side.
        saved_s: When the last commit ended.
        moved: Whether there is something to commit.
        commit: The one under way.
        unanswered_us: For how long each side had no answer while it was idle, which does not count for now.
        broken_s: When a broker last did not answer.
    """

    derivation: Derivation
    operator: Operator
    commits: Commits
    progress: Progress
    offsets: list[int]
    began_s: float
    heard_s: list[float]
    silences: list[Silence]
    saved_s: float
    clock_us: int = field(init=False)
    restored: int = field(init=False)
    processed: int = field(init=False)
    dead: int = field(init=False)
    late: int = field(init=False)
    waiting: deque[Waiting] = field(default_factory=deque)
    keys: list[bytes] = field(default_factory=list)
    values: list[bytes] = field(default_factory=list)
    rejects: list[tuple[int, Reject]] = field(default_factory=list)
    moved: bool = False
    ticked_s: float = 0.0
    unanswered_us: list[int] = field(init=False)
    broken_s: float = 0.0
    drained: bool = False
    snapshot_began_s: float = 0.0
    snapshot_s: float = 0.0
    state_bytes: int | None = None
    commit: Commit | None = None
    running: "Future[None] | None" = None
    retry_s: float = 0.0
    pause_s: float = PAUSE_S[0]

    def __post_init__(self) -> None:
        last = self.progress
        self.restored = self.processed = last.processed
        self.clock_us, self.dead, self.late = last.clock_us, last.dead, last.late
        self.unanswered_us = [0] * len(self.silences)

    @property
    def pending(self) -> int:
        """Records that were derived and are not committed."""
        return len(self.keys) + (len(self.commit.keys) if self.commit else 0)

    @property
    def next_us(self) -> int:
        """No time below this (but for the delay) is still to be derived of the left input."""
        for one in self.waiting:
            if one.times_us is not None:
                return max(self.clock_us, int(one.times_us[0]))
        return self.clock_us

    def take(self, derived: Derived) -> None:
        """Add what the operator gave."""
        self.keys += derived.keys
        self.values += derived.values
        self.rejects += derived.rejects
        self.late += sum(reject.kind == "late" for _, reject in derived.rejects)
        self.dead += sum(reject.kind == "dead" for _, reject in derived.rejects)
        self.moved = self.moved or bool(derived.keys or derived.rejects)

    def derive(self, limit_us: int, now_us: int, now_s: float) -> list[RecordBatch]:
        """Give the operator what waits, up to this event time; what it was given.

        Raises:
            OSError: what it looks up is away; what waits stays.
        """
        given = []
        while self.waiting:
            side, batch, times_us = self.waiting[0]
            count = len(batch.offsets)
            if times_us is not None:
                count = int(np.searchsorted(times_us, limit_us, side="right"))
            if count == 0:
                break
            part = batch.rows(slice(0, count))
            self.take(self.operator.process(side, part, now_us))
            if times_us is not None:
                self.clock_us = max(self.clock_us, int(times_us[count - 1]))
            self.processed += count
            self.offsets[side] = int(part.offsets[-1]) + 1
            self.heard_s[side], self.unanswered_us[side] = now_s, 0
            self.moved = True
            given.append(part)
            self.waiting.popleft()
            if count < len(batch.offsets):
                rest = None if times_us is None else times_us[count:]
                self.waiting.appendleft(Waiting(side, batch.rows(slice(count, None)), rest))
                break
        return given

    def standing(self, lag: int) -> Standing | None:
        """How far it is; None where it has nothing more to read and all of it is committed."""
        settled = not self.keys and self.commit is None
        if settled and not self.waiting and lag == 0:
            return None
        return Standing(self.progress.clock_us, self.next_us, settled)

    def is_ahead(self, side: int, lags: Sequence[int]) -> bool:
        """Whether nothing should be read of a side: some of it waits, or it is ahead of one that has more to read."""
        if any(one.side == side for one in self.waiting):
            return True
        clocks = self.operator.clocks_us
        return any(lag > 0 and clocks[side] > clocks[at] for at, lag in enumerate(lags) if at != side)

    def quiet(self, now_s: float) -> bool:
        """Whether a side had no records for a while."""
        return now_s - max(self.ticked_s, min(self.heard_s)) >= IDLE_S

    def leave_out(self, unanswered_s: Sequence[float], now_s: float, now_us: int) -> None:
        """Let steps of the wall clock not count, nor the time in which no broker answered until that has settled.

        A side that stays idle would hold up the other one for ever by the length of such a time. So it counts once both
        have been answered for five minutes on end.
        """
        if now_s - self.broken_s >= SETTLE_S:
            self.unanswered_us = [0] * len(self.silences)
        for side, (silence, seconds) in enumerate(zip(self.silences, unanswered_s, strict=True)):
            stepped_us, unanswered_us = silence.left_out_us(now_s, now_us, seconds)
            if stepped_us:
                self.operator.leave_out(side, stepped_us)
            if unanswered_us:
                self.broken_s = now_s
                if self.operator.clocks_us[side] != -NEVER_US:
                    self.unanswered_us[side] += unanswered_us

    def tick(self, lags: Sequence[int], now_s: float, now_us: int) -> None:
        """Let the clocks of sides advance that were read to their end and had no records for a while."""
        self.ticked_s = now_s
        for side, (heard_s, lag) in enumerate(zip(self.heard_s, lags, strict=True)):
            if now_s - heard_s >= IDLE_S and lag == 0:
                self.take(self.operator.tick(now_us - self.unanswered_us[side], side))

    def due(self, now_s: float) -> bool:
        """Whether to commit now; others may wait for what is committed of one of which something waits.

        Snapshots take at most a tenth of the time.
        """
        since_s = now_s - self.began_s
        if not self.moved or since_s < (0.0 if self.waiting else COMMIT_S):
            return since_s >= KEEP_S
        whole = self.commit is None and self.commits.wants_whole()
        return not whole or now_s - self.snapshot_began_s >= SNAPSHOT_SHARE * self.snapshot_s

    def begin(self, monotonic_s: Callable[[], float]) -> Commit:
        """Make a commit of what was derived."""
        self.began_s = monotonic_s()
        state = delta = None if self.commits.wants_whole() else self.operator.delta()
        if state is None:
            state, self.snapshot_began_s = self.operator.snapshot(), self.began_s
            self.snapshot_s = monotonic_s() - self.began_s
        self.state_bytes = len(state) or None
        progress = Progress(
            number=self.progress.number + 1,
            offsets=tuple(self.offsets),
            fingerprint=self.derivation.fingerprint,
            stateful=bool(state),
            processed=self.processed,
            dead=self.dead,
            late=self.late,
            written=self.progress.written + len(self.keys),
            epoch=self.commits.epoch,
            clock_us=self.next_us,
        )
        self.commit = Commit(progress, self.keys, self.values, state, delta is not None)
        self.keys, self.values, self.moved = [], [], False
        return self.commit

    def collect(self, now_s: float) -> bool:
        """Whether a commit has ended; one that failed is to be tried again after a pause.

        Raises:
            StaleEpochError: a newer owner has the partition.
        """
        if self.commit is None or self.running is None or not self.running.done():
            return False
        running, self.running = self.running, None
        try:
            running.result()
        except (KafkaError, OSError) as error:
            self.retry_s, self.pause_s = now_s + self.pause_s, min(2 * self.pause_s, PAUSE_S[1])
            about = {"view": self.derivation.name, "partition": self.commits.partition, "error": repr(error)}
            log.warning("committing again", extra=about)
            return False
        self.progress, self.commit, self.pause_s, self.saved_s = self.commit.progress, None, PAUSE_S[0], now_s
        return True

    def figures(self, lag: int, end: int, lost: int, now_us: int, now_s: float) -> dict[str, Any]:
        """What there is to say of it, as of the partition of a view (`holding.Held.figures`)."""
        clocks = self.operator.clocks_us
        watermark_us = min(clock - each.delay_us for clock, each in zip(clocks, self.derivation.inputs, strict=True))
        timed = DATED_US[0] < watermark_us < DATED_US[1]
        return {
            "offset": self.progress.offsets[0],
            "end": end,
            "lag": lag + sum(len(one.batch.offsets) for one in self.waiting),
            "watermark": datetime.fromtimestamp(watermark_us / 1e6, UTC).isoformat() if timed else None,
            "watermark_s": watermark_us / 1e6 if timed else None,
            "event_lag_s": round((now_us - clocks[0]) / 1e6, 3) if timed else None,
            "processed": self.processed - self.dead - self.late,
            "dead": self.dead,
            "late": self.late,
            "lost": lost,
            "keys": 0,
            "derived": self.progress.written,
            "state_bytes": self.operator.buffered_bytes,
            "checkpoint_bytes": self.state_bytes,
            "checkpoint_age_s": round(now_s - self.saved_s, 3) if self.moved or self.commit else 0.0,
            "read": self.processed - self.restored,
            "epoch": self.commits.epoch,
            "pid": os.getpid(),
            "heartbeat": datetime.fromtimestamp(now_us / 1e6, UTC).isoformat(),
        }
