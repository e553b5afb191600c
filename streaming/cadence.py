"""When to write: soon while the worker keeps up, seldom while it catches up.

A flush of 10,000 entities takes as long as hundreds of thousands of events. A worker that is behind has no fresh value
to show anyway, so it writes as seldom as its backlog allows and spends its time on events.
"""

CATCH_UP_S = 10.0
CATCH_UP_SHARE = 20  # a flush of 0.1 s, when behind, is followed by 2 s without one
BEHIND_S = 1.0
CHECKPOINT_S = 1.0
CAPTURE_SHARE = 10


class Cadence:
    """The clock of flushes and checkpoints of one worker; all times are of one monotonic clock, in seconds.

    Args:
        flush_s: Pause between flushes of a worker that keeps up; longer where a flush takes longer.
        now_s: Now.
    """

    def __init__(self, flush_s: float, now_s: float) -> None:
        self._flush_s = flush_s
        self._flush_took_s = 0.0
        self._flushed_s = now_s - flush_s
        self._read = 0
        self._next_checkpoint_s = now_s + CHECKPOINT_S

    def read(self, records: int) -> None:
        """So many records were processed."""
        self._read += records

    def flushed(self, began_s: float, ended_s: float) -> None:
        """A flush has ended."""
        self._flush_took_s = ended_s - began_s
        self._flushed_s, self._read = ended_s, 0

    def captured(self, began_s: float, ended_s: float) -> None:
        """The state was captured for a checkpoint."""
        self._next_checkpoint_s = ended_s + max(CHECKPOINT_S, CAPTURE_SHARE * (ended_s - began_s))

    def flush_in_s(self, now_s: float, lag: int) -> float:
        """How long until the next flush should begin; not above 0 when it is due.

        Args:
            now_s: Now.
            lag: Records that wait in the topic.
        """
        since_s = now_s - self._flushed_s
        pause_s = max(self._flush_s, self._flush_took_s)
        backlog_s = lag * since_s / self._read if self._read else 0.0
        if backlog_s > BEHIND_S:
            pause_s = max(pause_s, min(CATCH_UP_SHARE * self._flush_took_s, backlog_s, CATCH_UP_S))
        return pause_s - since_s

    def checkpoint_due(self, now_s: float) -> bool:
        """Whether the next checkpoint should begin."""
        return now_s >= self._next_checkpoint_s
