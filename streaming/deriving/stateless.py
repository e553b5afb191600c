"""What operators without state have in common: each record comes out as it came in, and nothing is kept."""

from streaming.derived import Derived


class Stateless:
    """The part of an `Operator` that is about waiting, clocks and snapshots."""

    buffered_bytes = 0

    def tick(self, now_us: int, side: int) -> Derived:
        """Nothing waits for the clock."""
        return Derived([], [], [])

    def leave_out(self, side: int, wall_us: int) -> None:
        """Nothing waits for the clock."""

    def drain(self) -> Derived:
        """Nothing waits."""
        return Derived([], [], [])

    def snapshot(self) -> bytes:
        """Nothing is kept."""
        return b""

    def delta(self) -> bytes | None:
        """There is no state that could change."""
        return None
