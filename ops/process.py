"""Processes that outlive the command that started them, and that a later command can find again and end."""

import contextlib
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil

MARK = "MILLRACE_PROCESS"  # in the environment of the process and, inherited, of everything that it starts
START_TOLERANCE_S = 1.5  # psutil rounds the boot time to a second
POLL_S = 0.1
ORPHANS_S = 2.0
KILL_S = 5.0


class ProcessError(ValueError):
    """A process that ended, or did not get ready in time."""


@dataclass(frozen=True)
class DetachedProcess:
    """A process in a session of its own, and its descendants.

    `started_s` is the start in seconds since boot: with the pid it tells the process from a later one that was given
    the same number. `mark` finds orphans, whose parent is gone.
    """

    pid: int
    started_s: float
    mark: str

    @classmethod
    def start(
        cls,
        command: Sequence[str | Path],
        log: Path,
        *,
        cwd: Path | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """Start `command` with both outputs appended to `log`; `environ` adds to the current environment."""
        log.parent.mkdir(parents=True, exist_ok=True)
        mark = secrets.token_hex(8)
        with log.open("ab") as output:
            child = subprocess.Popen(
                command,
                cwd=cwd,
                env=os.environ | dict(environ or {}) | {MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        child.returncode = 0  # it is waited for in `alive`, not by Popen, which would warn about it
        return cls(child.pid, _started_s(psutil.Process(child.pid)), mark)

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> Self:
        """Read what `record` wrote."""
        return cls(int(str(record["pid"])), float(str(record["started_s"])), str(record["mark"]))

    def record(self) -> dict[str, object]:
        """Return the JSON object by which a later command finds the process."""
        return asdict(self)

    def alive(self) -> bool:
        """Whether this very process still runs."""
        return self._leader() is not None

    def stop(self, term_s: float = 20.0) -> None:
        """End the process and everything it started, by SIGTERM, after `term_s` by SIGKILL; returns once all are gone.

        The process itself gets SIGTERM first and alone, so that it can end its children in its own order; what it
        leaves behind is ended after it. Nothing happens to a process that merely got the same pid.
        """
        leader = self._leader()
        family = self._family(leader)
        _end([leader] if leader else [], psutil.Process.terminate, term_s)
        family += self._family(self._leader())
        _end(family, psutil.Process.terminate, ORPHANS_S)
        _end(family, psutil.Process.kill, KILL_S)
        self._reap()
        if any(_runs(process) for process in family):
            raise ProcessError(f"process {self.pid} does not end, even by SIGKILL; end it by hand")

    def _leader(self) -> psutil.Process | None:
        self._reap()
        try:
            process = psutil.Process(self.pid)
            same = abs(_started_s(process) - self.started_s) < START_TOLERANCE_S
        except psutil.NoSuchProcess:
            return None
        return process if same and _runs(process) else None

    def _family(self, leader: psutil.Process | None) -> list[psutil.Process]:
        family = set()
        if leader:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = {leader, *leader.children(recursive=True)}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark:
                    family.add(process)
        return [process for process in family if _runs(process)]

    def _reap(self) -> None:
        """Take the exit status, in the command that is the parent; without it a dead child stays as a zombie."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)


def wait_ready(
    what: str, ready: Callable[[], bool], process: DetachedProcess, log: Path, limit_s: float, poll_s: float = POLL_S
) -> None:
    """Wait until `ready()`; a process that ended, or one not ready after `limit_s`, raises with the tail of its log."""
    deadline_s = time.monotonic() + limit_s
    while not ready():
        if not process.alive():
            raise ProcessError(f"{what} ended while starting; the end of {log}:\n{tail(log)}")
        if time.monotonic() > deadline_s:
            raise ProcessError(f"{what} is not ready after {limit_s:.0f} s; the end of {log}:\n{tail(log)}")
        time.sleep(poll_s)


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log file, indented; a sentence if there are none."""
    if not log.is_file() or not (text := log.read_text(errors="replace").rstrip()):
        return "    (the log is empty)"
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])


def _end(processes: list[psutil.Process], by: Callable[[psutil.Process], None], limit_s: float) -> None:
    """Send a signal to those that still run and wait until they are gone, at most `limit_s`."""
    running = [process for process in processes if _runs(process)]
    for process in running:
        with contextlib.suppress(psutil.NoSuchProcess):
            by(process)
    psutil.wait_procs(running, timeout=limit_s)


def _started_s(process: psutil.Process) -> float:
    return process.create_time() - psutil.boot_time()


def _runs(process: psutil.Process) -> bool:
    """Whether it has not ended; one that is being killed is a zombie while its other threads still hold its sockets."""
    try:
        return process.is_running() and (process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1)
    except psutil.NoSuchProcess:
        return False
