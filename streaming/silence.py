"""How much wall-clock time is silence of the entities: no step of the clock, nor what no broker answered for."""

STEP_US = 100_000


class Silence:
    """Of one partition of a topic.

    Args:
        now_s: monotonic clock.
        now_us: wall clock.
        unanswered_s: seconds without an answer so far, which only grow.
    """

    def __init__(self, now_s: float, now_us: int, unanswered_s: float) -> None:
        self._ahead_us = now_us - int(now_s * 1e6)
        self._unanswered_s = unanswered_s

    def left_out_us(self, now_s: float, now_us: int, unanswered_s: float) -> tuple[int, int]:
        """Wall-clock microseconds since the last call that were none of silence.

        Returns:
            By how much the wall clock was stepped (below zero: back), and how long no broker answered. Drift from the
            monotonic clock is a step wherever it has reached a tenth of a second.
        """
        stepped_us = now_us - int(now_s * 1e6) - self._ahead_us
        if abs(stepped_us) < STEP_US:
            stepped_us = 0
        self._ahead_us += stepped_us
        unanswered_us = int(1e6 * (unanswered_s - self._unanswered_s))
        self._unanswered_s = unanswered_s
        return stepped_us, unanswered_us
