"""The stack's rules, over parts that start nothing: the real ones take minutes and are tested end to end."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ops.environment import Environment
from ops.layout import Layout, Ports
from ops.parts import External, Handle, PartError
from ops.record import Record, RecordError
from ops.stack import Stack, StackError, ended_by_signals, open_stack


class Fake:
    """A part that writes down what is asked of it; `alive` is the service."""

    port: int | None = None
    log: Path | None = None
    ready_s = 0.0
    external = False

    def __init__(self, name: str, journal: list[str], launch: Callable[[], None] | None = None) -> None:
        self.name = name
        self.address = f"address of {name}"
        self.journal = journal
        self.alive: str | None = None
        self.gets_ready = True
        self.why: str | None = None
        self._launch = launch

    def launch(self) -> Handle:
        self.journal.append(f"launch {self.name}")
        if self._launch:
            self._launch()
        self.alive = f"{self.name}-{len(self.journal)}"
        return {"id": self.alive}

    def ready(self, handle: Handle) -> bool:
        return self.gets_ready and handle["id"] == self.alive

    def ended(self, handle: Handle) -> str | None:
        return self.why

    def pid(self, handle: Handle) -> int | None:
        return 7

    def stop(self, handle: Handle) -> None:
        self.journal.append(f"stop {self.name}")
        self.alive = None


def fail() -> None:
    raise PartError("port 1 is taken")


@pytest.fixture
def journal() -> list[str]:
    return []


@pytest.fixture
def parts(journal: list[str]) -> list[Fake]:
    return [Fake(name, journal) for name in ("kafka", "mlflow", "serve")]


def stack_of(home: Path, parts: list[Fake], said: list[str] | None = None) -> Stack:
    says = said if said is not None else []
    return Stack([[part] for part in parts], Record.read(home), Layout(home), says.append)


def test_up_starts_stages_in_order_and_down_ends_them_in_reverse(
    home: Path, parts: list[Fake], journal: list[str]
) -> None:
    stack_of(home, parts).up()
    assert [row.state for row in stack_of(home, parts).status()] == ["up"] * 3
    stack_of(home, parts).down()
    names = ["kafka", "mlflow", "serve"]
    assert journal == [f"launch {name}" for name in names] + [f"stop {name}" for name in reversed(names)]
    assert Record.read(home).parts == {}
    assert [row.state for row in stack_of(home, parts).status()] == ["down"] * 3


def test_parts_of_one_stage_start_side_by_side(home: Path, journal: list[str]) -> None:
    meeting = threading.Barrier(2, timeout=30)
    pair = [Fake(name, journal, lambda: meeting.wait() and None) for name in ("one", "other")]
    Stack([pair], Record.read(home), Layout(home), lambda _: None).up()
    assert all(part.alive for part in pair)


def test_up_twice_starts_nothing_again(home: Path, parts: list[Fake], journal: list[str]) -> None:
    stack_of(home, parts).up()
    said: list[str] = []
    stack_of(home, parts, said).up()
    assert len(journal) == 3
    assert all("runs already" in line for line in said)


def test_up_replaces_a_part_that_has_died(home: Path, parts: list[Fake], journal: list[str]) -> None:
    stack_of(home, parts).up()
    parts[1].alive = None
    stack_of(home, parts).up()
    assert journal[3:] == ["stop mlflow", "launch mlflow"]
    assert parts[1].alive


@pytest.mark.parametrize("trouble", ["launch", "ended", "late"])
def test_a_failure_half_way_ends_what_this_call_started_and_only_that(
    home: Path, parts: list[Fake], journal: list[str], trouble: str
) -> None:
    stack_of(home, parts[:1]).up()
    if trouble == "launch":
        parts[2]._launch = fail
        message = "port 1 is taken"
    elif trouble == "ended":
        parts[2].gets_ready, parts[2].why = False, "it ended; no memory"
        message = "serve does not start: it ended; no memory"
    else:
        parts[2].gets_ready = False
        message = "serve is not ready after 0 s"
    with pytest.raises(ValueError, match=message):
        stack_of(home, parts).up()
    assert "stop mlflow" in journal
    assert "stop kafka" not in journal
    assert list(Record.read(home).parts) == ["kafka"]
    assert [bool(part.alive) for part in parts] == [True, False, False]


def test_the_record_is_on_disk_before_the_part_is_ready(home: Path, journal: list[str]) -> None:
    class Slow(Fake):
        def ready(self, handle: Handle) -> bool:
            seen.append(dict(Record.read(home).parts["kafka"]) == dict(handle))
            return True

    seen: list[bool] = []
    stack_of(home, [Slow("kafka", journal)]).up()
    assert seen == [True]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_rolls_back(home: Path, parts: list[Fake], journal: list[str], number: signal.Signals) -> None:
    parts[1]._launch = lambda: os.kill(os.getpid(), number)
    parts[1].gets_ready, parts[1].ready_s = False, 60.0
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ending, ended_by_signals():
        stack_of(home, parts).up()
    assert ending.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert journal == ["launch kafka", "launch mlflow", "stop mlflow", "stop kafka"]
    assert Record.read(home).parts == {}


def test_down_goes_on_past_a_part_that_does_not_end_and_keeps_it_recorded(home: Path, journal: list[str]) -> None:
    class Stuck(Fake):
        def stop(self, handle: Handle) -> None:
            raise StackError("does not end, even by SIGKILL")

    parts = [Fake("kafka", journal), Stuck("mlflow", journal)]
    stack_of(home, parts).up()
    with pytest.raises(StackError, match="mlflow: does not end"):
        stack_of(home, parts).down()
    assert "stop kafka" in journal
    assert list(Record.read(home).parts) == ["mlflow"]


def test_status_tells_a_dead_part_from_a_slow_one(home: Path, parts: list[Fake]) -> None:
    stack_of(home, parts).up()
    parts[0].gets_ready = parts[1].gets_ready = False
    parts[0].why = "it ended"
    rows = stack_of(home, parts).status()
    assert [(row.name, row.state, row.pid) for row in rows] == [
        ("kafka", "ended", 7),
        ("mlflow", "not ready", 7),
        ("serve", "up", 7),
    ]


def test_an_external_service_is_neither_started_nor_ended(home: Path) -> None:
    external = External("mlflow", "http://elsewhere", "MLFLOW_TRACKING_URI")
    stack = Stack([[external]], Record.read(home), Layout(home), lambda _: None)
    stack.up()
    assert [row.state for row in stack.status()] == ["external"]
    stack.down()
    assert Record.read(home).parts == {}


def test_only_one_command_changes_a_stack(home: Path) -> None:
    with Record.read(home).exclusively():
        with pytest.raises(RecordError, match="another `millrace up`"), Record.read(home).exclusively():
            pass
    with Record.read(home).exclusively():
        pass


def test_a_damaged_record_is_one_sentence(home: Path) -> None:
    (home / "stack.json").write_text('{"layout": {}, "par')
    with pytest.raises(RecordError, match=r"stack\.json cannot be read"):
        Record.read(home)


def test_other_ports_are_refused_while_the_stack_is_up(home: Path) -> None:
    environment = Environment.read({"MILLRACE_HOME": str(home)})
    record = Record.read(home)
    record.begin(Layout(home, Ports(kafka=1900)).record())
    record.put("kafka", {})
    assert open_stack(environment).layout.ports.kafka == 1900
    with pytest.raises(StackError, match="other ports; run `millrace down` first"):
        open_stack(environment, Ports())
    record.drop("kafka")
    assert open_stack(environment).layout.ports.kafka == 9092
