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
from pathlib import Path
from tempfile import TemporaryDirectory

from feast import FeatureStore

from benchmarks.record import Figure, machine, write
from ops import freshness
from ops.broker import Broker
from ops.layout import REPOSITORY, binaries_folder
from ops.ports import free_ports
from streaming.partition import Partition
from streaming.simulators import bulk
from streaming.views import plans
from streaming.wire import Consumer
from streaming.worker import RECORDS_A_BATCH

EVENTS = 10_000_000
PUBLIC_EVENTS = 500_000
KEYS = 10_000
FRESHNESS_RATE_HZ = 5000.0
FASTEST_MS = 5
WARM_UP_S = 3.0
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
            figures.append(_public_path(broker.bootstrap_servers, conditions))
            figures += _live(broker.bootstrap_servers, home, conditions)
            figures += _fastest(broker.bootstrap_servers, home, conditions)
        finally:
            broker.stop()
    write("streaming", figures)


def _throughput(servers: str, conditions: str) -> Figure:
    bulk.fill(servers, "edits", EVENTS, keys=KEYS, partitions=2)
    done = subprocess.run(
        [*JOB, "--until-caught-up"], cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True, timeout=900
    )
    result = json.loads(done.stdout.splitlines()[-1])["views"]["editor_activity"]
    return Figure(
        name="Kafka to online store, one worker",
        value=result["events_per_s"],
        unit="events/s",
        better="higher",
        conditions=f"{EVENTS:,} events of {result['keys']:,} users, JSON of about 110 bytes, 100,000 a second of event"
        f" time; 18 aggregates over 3 windows; sqlite and Parquet; the broker on the same cores; {conditions}",
        target=1_000_000,
    )


def _public_path(servers: str, conditions: str) -> Figure:
    """The reader that is used where kafka-python is not the version whose fetcher is known."""
    store = FeatureStore(repo_path=str(REPOSITORY / "feature_repo"))
    (plan,) = plans(store, ["editor_activity"])
    source = Consumer(servers, plan.topic, group="benchmark", columnar=False)
    source.assign([0])
    source.seek(0, None)
    partition = Partition(plan, 0)
    started_s = time.process_time()
    while partition.counters.processed < PUBLIC_EVENTS:
        for batch in source.poll(1.0, RECORDS_A_BATCH):
            partition.process(batch, time.time_ns() // 1_000)
    rate = partition.counters.processed / (time.process_time() - started_s)
    source.close()
    at = f"{PUBLIC_EVENTS:,} events, CPU of one core; {conditions}"
    return Figure(
        "Kafka to features, public path of kafka-python", round(rate), "events/s", "higher", at, target=150_000
    )


def _live(servers: str, home: Path, conditions: str) -> Iterator[Figure]:
    status = home / "stream" / "status.json"
    at = f"{FRESHNESS_RATE_HZ:,.0f} events/s, 18 aggregates; {conditions}"
    with _job(home):
        start = _started(status)
        fresh = _freshness(servers, start)
        yield Figure("freshness p50", fresh.p50_ms, "ms", "lower", at)
        yield Figure("freshness p99", fresh.p99_ms, "ms", "lower", at, target=250)

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


def _fastest(servers: str, home: Path, conditions: str) -> Iterator[Figure]:
    at = f"--flush-ms {FASTEST_MS}, {FRESHNESS_RATE_HZ:,.0f} events/s, 18 aggregates; {conditions}"
    with _job(home, "--flush-ms", str(FASTEST_MS)):
        start = _started(home / "stream" / "status.json")
        fresh = _freshness(servers, start)
        yield Figure("freshness p50, fastest setting", fresh.p50_ms, "ms", "lower", at)
        yield Figure("freshness p99, fastest setting", fresh.p99_ms, "ms", "lower", at, target=100)


def _freshness(servers: str, start: datetime) -> freshness.Freshness:
    """Of a worker at work: the first seconds, in which it loads its kernels and old windows empty, are not counted."""
    repo = REPOSITORY / "feature_repo"
    freshness.measure(servers, repo, start, FRESHNESS_RATE_HZ, WARM_UP_S)
    return freshness.measure(servers, repo, start + timedelta(seconds=WARM_UP_S), FRESHNESS_RATE_HZ, FRESHNESS_S)


def _started(status: Path) -> datetime:
    """Waits for the job, and says from when on its windows hold nothing yet."""
    _wait_for(status, datetime.now(UTC))
    return max(datetime.fromisoformat(row["watermark"]) for row in _rows(status)) + timedelta(minutes=6)


@contextmanager
def _job(home: Path, *options: str) -> Iterator[None]:
    with (home / "job.log").open("w") as log:
        job = subprocess.Popen([*JOB, *options], cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT)
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
