"""From Kafka to the online store: events a second of one worker, freshness, and recovery from SIGKILL.

Everything is real: a broker, the Feast repository of this project, the stream job in a process of its own.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.record import Figure, machine, write
from ops import freshness
from ops.broker import Broker
from ops.layout import REPOSITORY, binaries_folder
from ops.ports import free_ports
from streaming.simulators import editors
from streaming.simulators.arrival import Faults, disturb, paced
from streaming.simulators.produce import ensure_topic, produce

EVENTS = 600_000
FRESHNESS_RATE_HZ = 2000.0
FRESHNESS_S = 20.0
JOB = [sys.executable, "ray_jobs/stream_features.py"]


def main() -> None:
    """Run all three in one temporary home, one after the other."""
    conditions = machine()
    with TemporaryDirectory(prefix="bench-") as folder:
        home = Path(folder)
        ports = free_ports(2)
        broker = Broker(home / "kafka", log=home / "kafka.log", port=ports[0], controller_port=ports[1])
        broker.start()
        try:
            environment = {"MILLRACE_HOME": folder, "KAFKA_BOOTSTRAP_SERVERS": broker.bootstrap_servers}
            os.environ |= environment
            (home / "features").mkdir()
            feast = [binaries_folder() / "feast", "--chdir", REPOSITORY / "feature_repo", "apply"]
            subprocess.run(feast, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            figures = [_throughput(broker.bootstrap_servers, conditions)]
            figures += _live(broker.bootstrap_servers, home, conditions)
        finally:
            broker.stop()
    write("streaming", figures)


def _throughput(servers: str, conditions: str) -> Figure:
    ensure_topic(servers, "edits", 2)
    events = islice(editors.edits(EVENTS, 0), EVENTS)
    produce(paced(disturb(events, Faults()), rate=None, speed_up=None), servers, "edits", lambda *_: None)
    done = subprocess.run(
        [*JOB, "--until-caught-up"], cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True, timeout=900
    )
    result = json.loads(done.stdout.splitlines()[-1])["views"]["editor_activity"]
    return Figure(
        name="Kafka to online store, one worker",
        value=result["events_per_s"],
        unit="events/s",
        better="higher",
        conditions=f"{EVENTS:,} generated edits (JSON) of one day, {result['keys']:,} users, 18 aggregates, sqlite; "
        + conditions,
    )


def _live(servers: str, home: Path, conditions: str) -> Iterator[Figure]:
    status = home / "stream" / "status.json"
    with _job(home):
        _wait_for(status, datetime.now(UTC))
        start = max(datetime.fromisoformat(row["watermark"]) for row in _rows(status)) + timedelta(minutes=6)
        fresh = freshness.measure(servers, REPOSITORY / "feature_repo", start, FRESHNESS_RATE_HZ, FRESHNESS_S)
        at = f"{fresh.probes} probes among {FRESHNESS_RATE_HZ:,.0f} events/s; {conditions}"
        yield Figure("freshness p50", fresh.p50_ms, "ms", "lower", at, target=100)
        yield Figure("freshness p99", fresh.p99_ms, "ms", "lower", at, target=500)

        for pid in {row["pid"] for row in _rows(status)}:
            os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        freshness.measure(servers, REPOSITORY / "feature_repo", start + timedelta(seconds=60), 20.0, 0.1)
        yield Figure(
            name="stream: SIGKILL of the worker to the next fresh feature",
            value=round(time.monotonic() - killed, 1),
            unit="s",
            better="lower",
            conditions=conditions,
            target=15,
        )


@contextmanager
def _job(home: Path) -> Iterator[None]:
    with (home / "job.log").open("w") as log:
        job = subprocess.Popen(JOB, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            job.send_signal(signal.SIGTERM)
            job.wait(60)


def _rows(status: Path) -> list[dict[str, str]]:
    """What the worker last said of each partition; nothing while it has said nothing."""
    report = json.loads(status.read_text()) if status.exists() else {"views": {}}
    return list(report["views"].get("editor_activity", {}).values())


def _wait_for(status: Path, since: datetime) -> None:
    deadline = time.monotonic() + 120
    while not (rows := _rows(status)) or any(datetime.fromisoformat(row["heartbeat"]) < since for row in rows):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the stream job did not start in 120 s; see {status.parent.parent / 'job.log'}")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
