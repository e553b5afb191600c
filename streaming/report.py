"""The files of running streams: what each says of itself, and how many workers it should have."""

import json
import os
import re
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SILENT_S = 30.0
NAME_LENGTH = 100

Status = Mapping[str, Mapping[int, Mapping[str, Any]]]


class ScaleError(ValueError):
    """Why no running stream was told another number of workers, in one sentence."""


class Report:
    """The files of one job, so that several can run in one home; and counts what this run has read.

    `status-<job>.json` says how its partitions are, `prometheus-<job>.json` where its workers serve their metrics, and
    `workers-<job>` how many there should be.

    Args:
        folder: made if it is not there.
        views: what the job computes.
    """

    def __init__(self, folder: Path, views: Iterable[str]) -> None:
        self._folder, self._views = folder, sorted(views)
        names = re.sub(r"[^\w+.-]", "_", "+".join(self._views))[:NAME_LENGTH]
        self._job = f"{names}-{socket.gethostname()}-{os.getpid()}"
        self._first: dict[tuple[str, int], int] = {}
        self._workers = 1

    def begin(self, workers: int) -> None:
        """Say that the job runs, with so many workers."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._workers = workers
        self._path("workers-{}").unlink(missing_ok=True)
        self.write([])

    def end(self) -> None:
        """Take back what makes sense of a running job only; what it said last stays for half a minute."""
        for name in ("prometheus-{}.json", "workers-{}"):
            self._path(name).unlink(missing_ok=True)

    def workers(self) -> int | None:
        """How many workers the job should have; None where nobody says it, or not as a number above 0."""
        try:
            workers = int(self._path("workers-{}").read_text())
        except (OSError, ValueError):
            return None
        if workers < 1:
            return None
        self._workers = workers
        return workers

    def remember(self, status: Status) -> None:
        """Keep what each partition had counted before this run, for the rate of this run."""
        for view, partitions in status.items():
            for number, figures in partitions.items():
                total = figures["processed"] + figures["dead"] + figures["late"]
                self._first.setdefault((view, number), total - figures["read"])

    def write(self, members: Sequence[Status]) -> None:
        """Replace the files by what the workers said last, and remove those of jobs that are silent."""
        views: dict[str, dict[int, Mapping[str, Any]]] = {}
        for status in members:
            for view, partitions in status.items():
                views.setdefault(view, {}).update(partitions)
        targets = sorted({row["metrics"] for rows in views.values() for row in rows.values() if row.get("metrics")})
        report = {"updated": datetime.now(UTC).isoformat(), "pid": os.getpid(), "computes": self._views, "views": views}
        _replace(self._path("status-{}.json"), report)
        if not self._path("workers-{}").exists():
            _replace(self._path("workers-{}"), self._workers)
        labels = {"job": "millrace-stream"}
        _replace(self._path("prometheus-{}.json"), [{"targets": targets, "labels": labels}])
        for job in _jobs(self._folder, older=True):
            for name in ("status-{}.json", "prometheus-{}.json", "workers-{}"):
                (self._folder / name.format(job)).unlink(missing_ok=True)

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

    def _path(self, name: str) -> Path:
        return self._folder / name.format(self._job)


def beating(status: Status, silence_s: float) -> bool:
    """Whether every worker's loop has turned within the time that it may be silent."""
    beats = [datetime.fromisoformat(row["heartbeat"]) for rows in status.values() for row in rows.values()]
    return all((datetime.now(UTC) - beat).total_seconds() < silence_s for beat in beats)


def read_views(folder: Path, since_s: float = 0.0) -> dict[str, dict[str, dict[str, Any]]]:
    """What all jobs that run say: view to partition to figures; of two that had a partition, the later owner's.

    Args:
        folder: of `Report`.
        since_s: leave out what was said before, in seconds since the epoch.
    """
    views: dict[str, dict[str, dict[str, Any]]] = {}
    for report in _reports(folder, since_s).values():
        for view, partitions in report["views"].items():
            for number, row in partitions.items():
                known = views.setdefault(view, {}).setdefault(number, row)
                if row.get("epoch", 0) > known.get("epoch", 0):
                    views[view][number] = row
    return views


def scale(folder: Path, workers: int, views: Iterable[str] | None = None) -> str:
    """Tell the job that runs, or the one that computes these views, how many workers it should have; its name.

    Raises:
        ScaleError: there is none, or several.
    """
    running = {job: report for job, report in _reports(folder).items() if (folder / f"workers-{job}").exists()}
    wanted = sorted(views or ())
    if wanted:
        running = {job: report for job, report in running.items() if set(wanted) <= set(report["computes"])}
        same = {job: report for job, report in running.items() if report["computes"] == wanted}
        running = same or running
    of = f" of {', '.join(wanted)}" if wanted else ""
    if not running:
        raise ScaleError(f"No stream{of} runs under {folder}: start one with --workers {workers}.")
    if len(running) > 1:
        told = "; ".join(", ".join(report["computes"]) for report in running.values())
        advice = "start and end jobs instead" if wanted else "say which with --views"
        raise ScaleError(f"{len(running)} streams{of} run under {folder} ({told}): {advice}.")
    (job,) = running
    _replace(folder / f"workers-{job}", workers)
    return job


def _jobs(folder: Path, older: bool = False) -> list[str]:
    """Jobs that said something in the last half a minute, or those that did not, by name."""
    since_s, found = time.time() - SILENT_S, []
    for path in sorted(folder.glob("status-*.json")):
        with suppress(FileNotFoundError):  # another job removes what is silent
            if (path.stat().st_mtime < since_s) is older:
                found.append(path.name.removeprefix("status-").removesuffix(".json"))
    return found


def _reports(folder: Path, since_s: float = 0.0) -> dict[str, dict[str, Any]]:
    """What jobs that run said last, and not before `since_s`, by name."""
    found = {}
    for job in _jobs(folder):
        path = folder / f"status-{job}.json"
        with suppress(FileNotFoundError):
            if path.stat().st_mtime >= since_s:
                found[job] = json.loads(path.read_text())
    return found


def _replace(path: Path, content: object) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)
