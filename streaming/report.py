"""The files of a running stream: what it says of itself, and how many workers it should have."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Status = Mapping[str, Mapping[int, Mapping[str, Any]]]


class Report:
    """Writes `status.json` and `prometheus.json` into a folder and counts what this run has read.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._first: dict[tuple[str, int], int] = {}

    def remember(self, status: Status) -> None:
        """Keep what each partition had counted before this run, for the rate of this run."""
        for view, partitions in status.items():
            for number, figures in partitions.items():
                total = figures["processed"] + figures["dead"] + figures["late"]
                self._first.setdefault((view, number), total - figures["read"])

    def write(self, members: Sequence[Status]) -> None:
        """Replace both files by what the workers said last."""
        views: dict[str, dict[int, Mapping[str, Any]]] = {}
        for status in members:
            for view, partitions in status.items():
                views.setdefault(view, {}).update(partitions)
        targets = sorted({row["metrics"] for rows in views.values() for row in rows.values() if row.get("metrics")})
        self._folder.mkdir(parents=True, exist_ok=True)
        updated = datetime.now(UTC).isoformat()
        _replace(self._folder / "status.json", {"updated": updated, "pid": os.getpid(), "views": views})
        _replace(self._folder / "prometheus.json", [{"targets": targets, "labels": {"job": "millrace-stream"}}])

    def totals(self, plans: Iterable[str], members: Sequence[Status]) -> dict[str, dict[str, float]]:
        """The sums of each view or derivation over its partitions, and the rate of this run."""
        totals: dict[str, dict[str, float]] = {}
        for view in plans:
            figures = {number: row for status in members for number, row in status.get(view, {}).items()}
            seconds = max((row["seconds"] for row in figures.values()), default=0.0)
            names = ("processed", "dead", "late", "keys")
            counted = {name: sum(row[name] for row in figures.values()) for name in names}
            before = sum(self._first.get((view, number), 0) for number in figures)
            read = counted["processed"] + counted["dead"] + counted["late"] - before
            totals[view] = counted | {
                "seconds": round(seconds, 3),
                "events_per_s": round(read / seconds, 1) if seconds else 0.0,
            }
        return totals


def beating(status: Status, silence_s: float) -> bool:
    """Whether every worker's loop has turned within the time that it may be silent."""
    beats = [datetime.fromisoformat(row["heartbeat"]) for rows in status.values() for row in rows.values()]
    return all((datetime.now(UTC) - beat).total_seconds() < silence_s for beat in beats)


def write_workers(folder: Path, workers: int) -> None:
    """Say how many workers a stream should have; one that runs changes to it within seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "workers", workers)


def read_workers(folder: Path) -> int | None:
    """How many workers a stream should have; None where nobody said it, or not as a number above 0."""
    try:
        workers = int((folder / "workers").read_text())
    except (OSError, ValueError):
        return None
    return workers if workers > 0 else None


def _replace(path: Path, content: object) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)
