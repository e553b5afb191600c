"""`millrace demo`: the whole way of the data once, by the commands that a user would type."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from ops.environment import Environment
from ops.jobs import REPOSITORY

STEP_LIMIT_S = 1200.0
TRANSCRIPTIONS = 40
EDIT_REQUESTS = 200
FRESHNESS_RATE_HZ = 2000.0
FRESHNESS_S = 5.0
WHISPER = Path("configs/whisper/digits.yaml")


class DemoError(Exception):
    """A step that did not end well, in one sentence with the end of its log."""


@dataclass(frozen=True)
class Shell:
    """Runs a user's commands in the repository, in a shell that `millrace env` activated."""

    environment: Mapping[str, str]
    logs: Path

    def run(self, name: str, command: str, activated: bool = True) -> dict[str, Any]:
        """Run one command to its end; its last line of JSON is the result, everything it printed is in its log.

        Raises:
            DemoError: the command failed, or did not end in STEP_LIMIT_S.
        """
        log = self.logs / f"demo-{name}.log"
        millrace = shlex.quote(str(Path(sys.executable).with_name("millrace")))
        script = command.replace("millrace ", f"{millrace} ", 1) if command.startswith("millrace ") else command
        if activated:
            script = f'eval "$({millrace} env)" && {script}'
        with log.open("w") as output:
            try:
                done = subprocess.run(
                    ["bash", "-c", script],
                    cwd=REPOSITORY,
                    env=dict(self.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=STEP_LIMIT_S,
                )
            except subprocess.TimeoutExpired:
                raise DemoError(f"`{command}` did not end in {STEP_LIMIT_S:.0f} s; its log is {log}.") from None
        lines = log.read_text(errors="replace").splitlines()
        if done.returncode:
            tail = "\n".join(lines[-25:])
            raise DemoError(f"`{command}` failed with exit code {done.returncode}; the end of {log}:\n{tail}")
        results = [line for line in lines if line.startswith("{") and line.endswith("}")]
        return dict(json.loads(results[-1])) if results else {}


class Narrator:
    """Numbered lines on standard output, and the same figures for the record."""

    def __init__(self, steps: int) -> None:
        self._steps, self._number = steps, 0
        self._began = time.monotonic()
        self.figures: dict[str, object] = {}

    def tell(self, text: str, **figures: object) -> None:
        """Say one step's line, with the seconds since the demonstration began."""
        self._number += 1
        self.figures |= figures
        seconds = time.monotonic() - self._began
        print(f"[{self._number}/{self._steps}] {text} ({seconds:.0f} s)", flush=True)


def main(argv: list[str], environment: Environment) -> int:
    """Bring the stack up in a home of its own, run each part once, and take it down again."""
    parser = argparse.ArgumentParser(prog="millrace demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the stack up at the end and print its addresses")
    arguments = parser.parse_args(argv)
    home = environment.home / "demo"
    shutil.rmtree(home, ignore_errors=True)  # a replay of the same day into old state would be all late
    (home / "logs").mkdir(parents=True)
    shell = Shell(dict(os.environ) | {"MILLRACE_HOME": str(home)}, home / "logs")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    narrator = Narrator(steps=8)
    failed = False
    try:
        _demonstrate(shell, narrator, home, environment)
    except DemoError as error:
        failed = True
        print(f"demo: {error}", file=sys.stderr, flush=True)
    finally:
        if failed or not arguments.keep:
            shell.run("down", "millrace down", activated=False)
    if failed:
        return 1
    record = home / "reports" / "demo.json"
    record.write_text(json.dumps(narrator.figures, indent=2) + "\n")
    print(f"figures: {record}\nreport:  {narrator.figures['report']}")
    if arguments.keep:
        print(f'the stack is up; in a shell: export MILLRACE_HOME={home}; eval "$(millrace env)"')
        print(shell.run_text("status", "millrace status"))
    return 0


def _demonstrate(shell: Shell, narrator: Narrator, home: Path, environment: Environment) -> None:
    began = time.monotonic()
    shell.run("up", f"millrace up {_free_ports()}", activated=False)
    layout = Layout.recorded(home)
    narrator.tell(f"stack: broker, Ray, MLflow, Feast, Serve and stream worker up in {time.monotonic() - began:.0f} s")
    _stream(shell, narrator, layout)
    _train(shell, narrator)
    _serve(narrator, layout, environment)
    _evaluate(shell, narrator)
