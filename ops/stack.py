"""The local stack as a whole: up in stages, down in reverse, and what it is doing now."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ops.environment import Environment
from ops.layout import Layout, Ports
from ops.parts import External, Features, Handle, Kafka, Mlflow, Part
from ops.process import tail
from ops.ray_parts import Ray, Serve, Stream, dashboard_client
from ops.record import Record

POLL_S = 0.2
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Say = Callable[[str], None]


class StackError(ValueError):
    """The stack cannot be brought up or down as asked."""


@dataclass(frozen=True)
class Row:
    """What `status` says about a part."""

    name: str
    state: str
    pid: int | None
    address: str
    log: Path | None


class Stack:
    """Parts in stages: a stage starts when all parts of the stage before it are ready, its parts start in parallel."""

    def __init__(self, stages: Sequence[Sequence[Part]], record: Record, layout: Layout, say: Say = print) -> None:
        self.stages = stages
        self.record = record
        self.layout = layout
        self._say = say
        self._cancelled = threading.Event()
        self._started: list[tuple[Part, Handle]] = []

    def up(self) -> None:
        """Start what does not run yet; what this call started ends again if it cannot finish, for whatever reason."""
        self._cancelled.clear()
        self._started = []
        self.record.begin(self.layout.record())
        try:
            for stage in self.stages:
                self._bring_up(stage)
        except BaseException:
            self._roll_back()
            raise

    def down(self) -> None:
        """End what the record names, and nothing else; goes on to the next part where one does not end."""
        problems = []
        for part in reversed([part for stage in self.stages for part in stage]):
            if (handle := self.record.parts.get(part.name)) is None:
                continue
            try:
                part.stop(handle)
            except ValueError as error:
                problems.append(f"{part.name}: {error}")
                continue
            self.record.drop(part.name)
            if not part.external:
                self._say(f"{part.name:<9} down")
        if problems:
            raise StackError("; ".join(problems))

    def status(self) -> list[Row]:
        """Return one row a part, in the order of their start."""
        parts = [part for stage in self.stages for part in stage]
        with ThreadPoolExecutor(len(parts)) as threads:
            return list(threads.map(self._row, parts))

    def _row(self, part: Part) -> Row:
        handle = self.record.parts.get(part.name)
        if part.external:
            state = "external" if part.ready({}) else "external, silent"
        elif handle is None:
            state = "down"
        elif part.ready(handle):
            state = "up"
        else:
            state = "ended" if part.ended(handle) else "not ready"
        pid = part.pid(handle) if handle is not None else None
        return Row(part.name, state, pid, part.address, part.log)

    def _bring_up(self, stage: Sequence[Part]) -> None:
        with ThreadPoolExecutor(len(stage)) as threads:
            futures = [threads.submit(self._start, part) for part in stage]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                self._cancelled.set()
                raise

    def _start(self, part: Part) -> None:
        began_s = time.monotonic()
        recorded = self.record.parts.get(part.name)
        if recorded is not None:
            if part.ready(recorded):
                self._say(f"{part.name:<9} runs already at {part.address}")
                return
            part.stop(recorded)
            self.record.drop(part.name)
        handle = part.launch()
        self._started.append((part, handle))
        self.record.put(part.name, handle)
        self._wait(part, handle)
        word = "external" if part.external else f"up after {time.monotonic() - began_s:.1f} s"
        self._say(f"{part.name:<9} {word} at {part.address}")

    def _wait(self, part: Part, handle: Handle) -> None:
        deadline_s = time.monotonic() + part.ready_s
        while not part.ready(handle):
            if reason := part.ended(handle):
                raise StackError(f"{part.name} does not start: {reason}")
            if time.monotonic() > deadline_s:
                end = f"; the end of {part.log}:\n{tail(part.log)}" if part.log else ""
                raise StackError(f"{part.name} is not ready after {part.ready_s:.0f} s{end}")
            if self._cancelled.wait(POLL_S):
                raise StackError(f"{part.name} was not waited for")

    def _roll_back(self) -> None:
        for part, handle in reversed(self._started):
            try:
                part.stop(handle)
            except ValueError as error:
                self._say(f"{part.name:<9} {error}")
                continue
            self.record.drop(part.name)
            if not part.external:
                self._say(f"{part.name:<9} ended again")


def open_stack(environment: Environment, ports: Ports | None = None, say: Say = print) -> Stack:
    """Return the stack of a home: the one that is up there, else one on `ports` that can be brought up.

    Raises:
        StackError: `ports` are asked for while the stack is up on others.
    """
    record = Record.read(environment.home)
    if record.layout and record.parts:
        layout = Layout.from_record(environment.home, record.layout, environment.api_keys)
        if ports and ports != layout.ports:
            raise StackError(f"the stack of {environment.home} is up on other ports; run `millrace down` first")
    else:
        known = Ports(**record.layout["ports"]) if record.layout else None
        layout = Layout.of(environment, ports or Ports(), known)
    return Stack(stages(layout), record, layout, say)


def stages(layout: Layout) -> list[list[Part]]:
    """Return the parts in the order of their start; Ray comes early because it must not start beside heavy work."""
    dashboard = dashboard_client(layout)
    kafka: Part = Kafka(layout)
    mlflow: Part = Mlflow(layout)
    if layout.external_kafka:
        kafka = External("kafka", layout.external_kafka, "KAFKA_BOOTSTRAP_SERVERS")
    if layout.external_mlflow:
        mlflow = External("mlflow", layout.external_mlflow, "MLFLOW_TRACKING_URI")
    return [
        [kafka, Ray(layout, dashboard)],
        [mlflow, Features(layout)],
        [Serve(layout, dashboard), Stream(layout, dashboard)],
    ]


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn the first SIGTERM, SIGINT or SIGHUP into SystemExit and ignore later ones: a roll-back can finish."""

    def leave(number: int, frame: FrameType | None) -> None:
        for one in SIGNALS:
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {one: signal.signal(one, leave) for one in SIGNALS}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
