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
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from feast import FeatureStore

from benchmarks.record import Figure, machine, write
from ops import freshness
from ops.broker import Broker
from ops.layout import REPOSITORY, binaries_folder
from ops.ports import free_ports
from streaming.consumer import Consumer
from streaming.partition import Partition
from streaming.report import read_views
from streaming.simulators import bulk
from streaming.views import plans
from streaming.worker import RECORDS_A_BATCH

EVENTS = 10_000_000
PUBLIC_EVENTS = 500_000
KEYS = 10_000
SIMULATED = 2_000_000
FAULTS = ["--disorder", "0.05", "--duplicates", "0.01", "--late", "0.01", "--poison", "0.001"]
FRESHNESS_RATE_HZ = 5000.0
FASTEST_MS = 5
WARM_UP_S = 3.0
FRESHNESS_S = 20.0
JOB = [sys.executable, "ray_jobs/stream_features.py"]


def main() -> None:
    """Run all in one temporary folder, one after the other."""
    conditions = machine()
    with TemporaryDirectory(prefix="bench-") as folder:
        home = Path(folder)
        ports = free_ports(2)
        broker = Broker(home / "kafka", log=home / "kafka.log", port=ports[0], controller_port=ports[1])
        pid = broker.start().pid
        try:
            os.environ["KAFKA_BOOTSTRAP_SERVERS"] = broker.bootstrap_servers
            bulk.fill(broker.bootstrap_servers, "edits", EVENTS, keys=KEYS, partitions=2)
            figures = list(_throughput(home, psutil.Process(pid), conditions))
            figures.append(_public_path(broker.bootstrap_servers, conditions))
            figures.append(_simulator(conditions))
            figures += _live(broker.bootstrap_servers, home, conditions)
            figures += _fastest(broker.bootstrap_servers, home, conditions)
        finally:
            broker.stop()
    write("streaming", figures)


def _throughput(home: Path, broker: psutil.Process, conditions: str) -> Iterator[Figure]:
    """Of two workers and of one, each from the beginning; the home of the one is gone on with."""
    two, _, broker_s = _caught_up(home / "two", 2, broker)
    one, keys, _ = _caught_up(home, 1, broker)
    at = (
        f"{EVENTS:,} events of {keys:,} users, JSON of about 110 bytes, 100,000 a second of event time; 18 aggregates"
        f" over 3 windows; sqlite and Parquet; the broker on the same cores; {conditions}"
    )
    yield Figure("Kafka to online store, one worker", one, "events/s", "higher", at, target=1_000_000)
    shared = f"two workers, two partitions, one sqlite file; the broker took {broker_s:.1f} s of CPU; {at}"
    yield Figure("Kafka to online store, two workers over one", round(two / one, 2), "x", "higher", shared, target=1.7)


def _caught_up(home: Path, workers: int, broker: psutil.Process) -> tuple[float, int, float]:
    """Events a second, how many entities there were, and the seconds of CPU that the broker took."""
    os.environ["MILLRACE_HOME"] = str(home)
    (home / "features").mkdir(parents=True)
    feast = [binaries_folder() / "feast", "--chdir", REPOSITORY / "feature_repo", "apply"]
    subprocess.run(feast, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before_s = _cpu_s(broker)
    job = [*JOB, "--workers", str(workers), "--until-caught-up"]
    done = subprocess.run(job, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True, timeout=900)
    result = json.loads(done.stdout.splitlines()[-1])["views"]["editor_activity"]
    return result["events_per_s"], result["keys"], _cpu_s(broker) - before_s


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


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


def _simulator(conditions: str) -> Figure:
    """What `millrace simulate` says, at the pace that it can."""
    command = [binaries_folder() / "millrace", "simulate", "measurements", "--limit", str(SIMULATED), *FAULTS]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    rate = json.loads(done.stdout)["messages_per_s"]
    at = f"{SIMULATED:,} measurements, {' '.join(FAULTS)}, one process; {conditions}"
    return Figure("simulator to Kafka", rate, "messages/s", "higher", at, target=100_000)


def _live(servers: str, home: Path, conditions: str) -> Iterator[Figure]:
    status = home / "stream"
    at = f"{FRESHNESS_RATE_HZ:,.0f} events/s, 18 aggregates; {conditions}"
    with _job(home):
        start = _started(status)
        yield Figure("stream: start of a worker to its first partition", _start_s(home), "s", "lower", conditions, 5)
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
        start = _started(home / "stream")
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


def _start_s(home: Path) -> float:
    """Seconds from the supervisor's line to the worker's in the log of the job."""
    at: dict[str, datetime] = {}
    for line in (home / "job.log").read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, KeyError):
            entry = json.loads(line[line.index("{") :])
            at.setdefault(entry["event"], datetime.fromisoformat(entry["time"]))
    return round((at["partition taken"] - at["worker started"]).total_seconds(), 1)


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
    return list(read_views(status).get("editor_activity", {}).values())


def _wait_for(status: Path, since: datetime) -> None:
    deadline = time.monotonic() + 120
    while not (rows := _rows(status)) or any(datetime.fromisoformat(row["heartbeat"]) < since for row in rows):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the stream job did not start in 120 s; see {status.parent / 'job.log'}")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
