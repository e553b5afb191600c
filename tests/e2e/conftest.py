"""One demonstration for the whole tier: `millrace demo --keep`, as a user runs it, in a home of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ops.environment import Environment
from ops.layout import Layout

ROOT = Path(__file__).resolve().parents[2]
DEMO_LIMIT_S = 1500


@dataclass(frozen=True)
class Demonstration:
    """A stack that is up, and what the demonstration said and measured on its way there."""

    home: Path
    layout: Layout
    said: str
    figures: Mapping[str, Any]

    @property
    def environ(self) -> dict[str, str]:
        """What a process needs to be of this home's stack."""
        return _environ(self.home)

    def shell(self, command: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Type one command into an activated shell in the repository."""
        return subprocess.run(
            ["bash", "-c", f'eval "$(millrace env)" && {command}'],
            cwd=ROOT,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )


def _environ(home: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "MILLRACE_HOME": str(home), "PATH": path}


@pytest.fixture(scope="session")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demonstration]:
    outer = tmp_path_factory.mktemp("millrace")
    home = outer / "demo"
    with (outer / "demo.txt").open("w+") as output:
        try:
            done = subprocess.run(
                ["millrace", "demo", "--keep"],
                cwd=ROOT,
                env=_environ(outer),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=DEMO_LIMIT_S,
            )
            output.seek(0)
            said = output.read()
            print(said)
            assert done.returncode == 0, said
            layout = Layout.current(Environment.read({"MILLRACE_HOME": str(home)}))
            figures = json.loads((home / "reports" / "demo.json").read_text())
            yield Demonstration(home, layout, said, figures)
        finally:
            subprocess.run(["millrace", "down"], cwd=ROOT, env=_environ(home), timeout=180, check=True)
