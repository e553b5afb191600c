"""Detached processes: found again by a later command, ended whole, never mistaken for another."""

import dataclasses
import json
import signal
import sys
from pathlib import Path

import psutil
import pytest

from ops import process as process_module
from ops.process import DetachedProcess, ProcessError, tail, wait_ready

SLEEPER = "import sys, time; print('ready', flush=True); time.sleep(600)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SLEEPER
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', {SLEEPER!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, 'ready', flush=True)
child.wait()
"""


def start(code: str, log: Path) -> DetachedProcess:
    started = DetachedProcess.start([sys.executable, "-c", code], log)
    wait_ready("it", lambda: log.is_file() and "ready" in log.read_text(), started, log, 30.0, poll_s=0.01)
    return started


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "part.log"


def test_it_runs_in_a_session_of_its_own_and_ends_on_stop(log: Path) -> None:
    started = start(SLEEPER, log)
    assert started.alive()
    assert psutil.Process(started.pid).terminal() is None
    started.stop()
    assert not started.alive()
    assert not psutil.pid_exists(started.pid)


def test_it_is_found_again_from_its_record(log: Path) -> None:
    started = start(SLEEPER, log)
    again = DetachedProcess.from_record(json.loads(json.dumps(started.record())))
    assert again == started
    assert again.alive()
    again.stop()
    assert not started.alive()


def test_one_that_ignores_sigterm_is_killed(log: Path) -> None:
    started = start(DEAF, log)
    started.stop(term_s=0.1)
    assert not started.alive()


def test_a_recycled_pid_is_neither_alive_nor_ended(log: Path) -> None:
    other = start(SLEEPER, log)
    recorded = dataclasses.replace(other, started_s=other.started_s - 100, mark="0" * 16)
    assert not recorded.alive()
    recorded.stop()
    assert other.alive()
    other.stop()


def test_descendants_end_too_even_as_orphans(log: Path) -> None:
    started = start(PARENT, log)
    child = psutil.Process(int(log.read_text().split()[0]))
    psutil.Process(started.pid).send_signal(signal.SIGKILL)
    started.stop()
    assert not child.is_running()


def test_one_that_ends_while_starting_raises_with_the_end_of_its_log(log: Path) -> None:
    failing = DetachedProcess.start([sys.executable, "-c", "raise SystemExit('no such thing')"], log)
    with pytest.raises(
        ProcessError, match=r"(?s)the part ended while starting; the end of .*part\.log:\n +no such thing"
    ):
        wait_ready("the part", lambda: False, failing, log, 30.0, poll_s=0.01)


def test_one_that_never_gets_ready_raises_after_the_limit(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = start(SLEEPER, log)
    clock = iter(range(1000))
    monkeypatch.setattr(process_module.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(ProcessError, match="the part is not ready after 3 s"):
        wait_ready("the part", lambda: False, started, log, 3.0, poll_s=0.0)
    monkeypatch.undo()
    started.stop()


def test_tail_keeps_the_last_lines_and_says_when_there_are_none(tmp_path: Path) -> None:
    log = tmp_path / "part.log"
    assert tail(log) == "    (the log is empty)"
    log.write_text("\n".join(map(str, range(100))))
    assert tail(log, 2) == "    98\n    99"
