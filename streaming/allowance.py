"""How much memory the states of one process may take together."""

import threading

import psutil

Holder = tuple[str, int]
"""A view or derivation, and one of its partitions."""


def share_bytes(workers: int) -> int:
    """What each of so many workers may take: a share of half of this machine's memory."""
    return int(psutil.virtual_memory().total) // 2 // workers


class Allowance:
    """Shared by all partitions of all views that a process computes; safe for several threads.

    Args:
        limit_bytes: that all may take together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._taken: dict[Holder, int] = {}
        self._lock = threading.Lock()

    def grant(self, holder: Holder, needed_bytes: int, has_bytes: int = 0) -> bool:
        """Note that a holder takes so many bytes now; False, and nothing is noted, where that would be too much.

        Args:
            holder: who takes them, instead of what it took before.
            needed_bytes: that it takes in all.
            has_bytes: that it cannot give back, and may keep also beyond the limit.
        """
        with self._lock:
            others = sum(taken for each, taken in self._taken.items() if each != holder)
            if needed_bytes > has_bytes and others + needed_bytes > self.limit_bytes:
                return False
            self._taken[holder] = needed_bytes
            return True

    def limits(self, holder: Holder) -> str:
        """Why a holder is not granted more, and what to do, for its sentence."""
        with self._lock:
            others = sum(taken for each, taken in self._taken.items() if each != holder)
        return (
            f"others of its worker take {others / 2**20:,.0f}, and all together may take"
            f" {self.limit_bytes / 2**20:,.0f}: raise the limit (--max-state-mb), add workers or partitions"
        )

    def shrink(self, holder: Holder, has_bytes: int) -> None:
        """Note that a holder has given memory back."""
        with self._lock:
            if holder in self._taken:
                self._taken[holder] = min(self._taken[holder], has_bytes)

    def free(self, holder: Holder) -> None:
        """Note that a holder is gone."""
        with self._lock:
            self._taken.pop(holder, None)
