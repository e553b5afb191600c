"""What a worker holds of a partition, and what it needs around it."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from streaming.partition import Partition
from streaming.records import Drift, Emission, RecordBatch, Reject
from streaming.silence import Silence

DATED_US = (-60_000_000_000_000_000, 250_000_000_000_000_000)


class Source(Protocol):
    """What a worker needs of a consumer (`consumer.Consumer`)."""

    lost: dict[int, int]

    def assign(self, partitions: Iterable[int]) -> None: ...  # noqa: D102
    def seek(self, partition: int, offset: int | None) -> int: ...  # noqa: D102
    def poll(self, timeout_s: float, max_records: int) -> list[RecordBatch]: ...  # noqa: D102
    def position(self, partition: int) -> int: ...  # noqa: D102
    def lag(self) -> dict[int, int]: ...  # noqa: D102
    def unanswered_s(self) -> dict[int, float]: ...  # noqa: D102
    def end_offsets(self) -> dict[int, int]: ...  # noqa: D102
    def commit(self, offsets: Mapping[int, int]) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Online(Protocol):
    """What a worker needs of an online sink (`sinks.OnlineSink`); `sync` is called from another thread."""

    def write(self, emissions: list[Emission]) -> int: ...  # noqa: D102
    def sync(self) -> None: ...  # noqa: D102


class Offline(Protocol):
    """What a worker needs of an offline log (`offline.OfflineLog`); `write` and `compact` come from another thread."""

    def write(  # noqa: D102
        self, partition: int, first: int, next_offset: int, clock_us: int, rows: Sequence[tuple[Emission, int]]
    ) -> None: ...
    def truncate(self, partition: int, offset: int, clock_us: int, aside: str = "") -> int: ...  # noqa: D102
    def compact(self, partition: int, offset: int, clock_us: int) -> int: ...  # noqa: D102


class NoOnline:
    """An `Online` that lets the online store be as it is."""

    def write(self, emissions: list[Emission]) -> int:
        """Write none of them."""
        return 0

    def sync(self) -> None:
        """There is nothing to make durable."""


class NoOffline:
    """An `Offline` that lets the log be as it is."""

    def write(
        self, partition: int, first: int, next_offset: int, clock_us: int, rows: Sequence[tuple[Emission, int]]
    ) -> None:
        """Write none of them."""

    def truncate(self, partition: int, offset: int, clock_us: int, aside: str = "") -> int:
        """Remove nothing."""
        return 0

    def compact(self, partition: int, offset: int, clock_us: int) -> int:
        """Merge nothing."""
        return 0


class Rejects(Protocol):
    """What a worker needs of a reject log (`rejects.RejectLog`)."""

    def write(self, rejects: list[Reject]) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Drifts(Protocol):
    """What a worker needs of a drift log (`control.DriftLog`)."""

    def write(self, drifts: list[Drift]) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


@dataclass
class Held:
    """A partition and what waits to reach the offline log and the next checkpoint."""

    partition: Partition
    epoch: int
    captured_offset: int
    saved_offset: int
    saved_s: float
    restored: int
    silence: Silence
    rows: list[tuple[Emission, int]] = field(default_factory=list)
    last_record_s: float = 0.0
    ticked_s: float = 0.0
    dirty: bool = True  # a restored partition may hold what was due and not emitted
    shifted: bool = False  # time was left out since its last snapshot
    unchained: bool = False  # its last snapshot is not the last checkpoint
    suspect_until: int = -1  # records up to this offset are tried on a copy first
    checkpoint_bytes: int | None = None

    def figures(self, position: int, lag: int, lost: int, now_us: int, now_s: float) -> dict[str, Any]:
        """What there is to say of it; `position` and `lag` are of its consumer."""
        partition, counters = self.partition, self.partition.counters
        timed = DATED_US[0] < partition.watermark_us < DATED_US[1]  # else no event has set the clock
        return {
            "offset": self.saved_offset,
            "end": position + lag,
            "lag": lag,
            "watermark": datetime.fromtimestamp(partition.watermark_us / 1e6, UTC).isoformat() if timed else None,
            "watermark_s": partition.watermark_us / 1e6 if timed else None,
            "event_lag_s": round((now_us - partition.clock_us) / 1e6, 3) if timed else None,
            "processed": counters.processed - counters.dead - counters.late,
            "dead": counters.dead,
            "late": counters.late,
            "lost": lost,
            "keys": counters.keys,
            "panes": partition.panes,
            "drifts": partition.learning[1],
            "state_bytes": partition.state_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoint_age_s": round(now_s - self.saved_s, 3),
            "read": counters.processed - self.restored,
            "epoch": self.epoch,
            "pid": os.getpid(),
            "heartbeat": datetime.fromtimestamp(now_us / 1e6, UTC).isoformat(),
        }
