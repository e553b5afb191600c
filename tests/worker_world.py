"""The disk and the broker of a worker in unit tests: a broker in memory, for crashes between any two steps of it."""

import json
import re
import shutil
import sqlite3
import threading
from concurrent.futures import Executor, Future
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import duckdb
import numpy as np
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Float64, Int64, String

from streaming import worker as worker_module
from streaming.checkpoint import CheckpointStore
from streaming.offline import OfflineLog
from streaming.partition import Partition
from streaming.plan import Aggregate, Column, Plan
from streaming.records import RecordBatch
from streaming.sinks import OnlineSink
from streaming.worker import Worker

MINUTE_US = 60_000_000
PLAN = Plan(
    view="activity",
    topic="edits",
    bootstrap_servers="",
    entity="user",
    entity_type="string",
    timestamp="time",
    columns=(Column("added", "bigint", nullable=True),),
    aggregates=(
        Aggregate("edits", "added", "count", 10 * MINUTE_US, MINUTE_US),
        Aggregate("mean", "added", "mean", 2 * MINUTE_US, MINUTE_US),
    ),
    delay_us=MINUTE_US,
)
START = datetime(2024, 5, 1, tzinfo=UTC)
WALL_US = int((START + timedelta(days=1)).timestamp()) * 1_000_000


def record(user: str, minute: float, added: int | None) -> tuple[bytes, bytes]:
    event = {"user": user, "time": (START + timedelta(minutes=minute)).isoformat(), "added": added}
    return user.encode(), json.dumps(event).encode()


def history(seed: int, users: list[str]) -> list[tuple[bytes | None, bytes | None]]:
    """20 records of one partition: mostly good, with two poison ones and a late one among them."""
    random = np.random.default_rng(seed)
    records: list[tuple[bytes | None, bytes | None]] = [
        record(users[random.integers(len(users))], 0.25 * n, int(random.integers(100))) for n in range(20)
    ]
    records[4], records[11], records[16] = (b"x", b"{not json"), (None, None), record(users[0], -30, 5)
    return records


HISTORY = {0: history(0, ["ann", "bob"]), 1: history(1, ["cyd", "dan", "eve"])}


class Inline(Executor):
    """Runs a job at once, so that a crash can be put between any two of its steps."""

    def submit(self, task, /, *args, **options):
        future = Future()
        try:
            future.set_result(task(*args, **options))
        except BaseException as error:
            future.set_exception(error)
        return future


class Memory:
    """A topic in memory: a crash is put between any two steps below, which a broker would make slow and random."""

    polled, batches = 7, 1

    def __init__(self, logs=HISTORY):
        self.logs, self.at, self.committed, self.turn, self.lost = logs, {}, {}, count(), {}
        self.silent_s = 0.0

    def assign(self, partitions):
        self.at = {partition: self.at.get(partition, 0) for partition in partitions}

    def seek(self, partition, offset):
        self.at[partition] = offset or 0
        return self.at[partition]

    def poll(self, timeout_s, max_records):
        for _ in self.at:
            partition = list(self.at)[next(self.turn) % len(self.at)]
            found = []
            for _ in range(self.batches):
                rows = self.logs[partition][self.at[partition] : self.at[partition] + self.polled]
                if rows:
                    self.at[partition] += len(rows)
                    found.append(batch(partition, self.at[partition] - len(rows), rows))
            if found:
                return found
        return []

    def position(self, partition):
        return self.at[partition]

    def unanswered_s(self):
        return dict.fromkeys(self.at, self.silent_s)

    def lag(self):
        return {partition: len(self.logs[partition]) - at for partition, at in self.at.items()}

    def end_offsets(self):
        return {partition: len(self.logs[partition]) for partition in self.at}

    def commit(self, offsets):
        self.committed.update(offsets)

    def close(self):
        pass


class RejectTopic:
    """What a broker would hold of the reject topics; it outlives the workers."""

    def __init__(self):
        self.found = []

    def write(self, rejects):
        self.found.extend(rejects)

    def close(self):
        pass


def batch(partition, first, rows) -> RecordBatch:
    buffer, keys, values = b"", [], []
    for row in rows:
        for spans, data in zip((keys, values), row, strict=True):
            spans.append((-1, -1) if data is None else (len(buffer), len(buffer) + len(data)))
            buffer += data or b""
    offsets = np.arange(first, first + len(rows))
    spans = (np.array(keys, dtype=np.int64), np.array(values, dtype=np.int64))
    return RecordBatch(partition, np.frombuffer(buffer, dtype=np.uint8), offsets, *spans, np.zeros(len(rows), np.int64))


class Crash(BaseException):
    """A SIGKILL: no handler of the worker may catch it."""


class Steps:
    """Counts the steps of a worker and crashes right after the chosen one."""

    def __init__(self, crash_after: int | None = None):
        self.crash_after, self.names = crash_after, []

    def done(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self.crash_after:
            raise Crash(name)

    def watch(self, thing, *methods: str):
        for method in methods:
            original = getattr(thing, method)

            def stepped(*args, original=original, name=method, **options):
                result = original(*args, **options)
                self.done(f"{type(thing).__name__}.{name}")
                return result

            setattr(thing, method, stepped)
        return thing


class Store(FeatureStore):
    """Offers a plain FeatureView under the name of a stream view: the sink reads its name and fields only."""

    def get_stream_feature_view(self, name, **_):
        return self.get_feature_view(name)


def config(folder: Path, registry: Path) -> RepoConfig:
    store = {"type": "streaming.sinks.GuardedSqliteOnlineStore", "path": str(folder / "online.db")}
    return RepoConfig(
        project="test",
        provider="local",
        registry=str(registry),
        online_store=store,
        entity_key_serialization_version=3,
    )


def apply(folder: Path) -> Path:
    """Declare the view in a Feast repository in the folder."""
    store = FeatureStore(config=config(folder, folder / "registry.db"))
    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    fields = [Field(name="user", dtype=String), Field(name="edits", dtype=Int64), Field(name="mean", dtype=Float64)]
    source = FileSource(path=str(folder / "none.parquet"), timestamp_field="event_timestamp")
    store.apply([user, FeatureView(name="activity", entities=[user], schema=fields, source=source)])
    store._get_provider().online_store._get_conn(store.config).close()  # leaves one file to copy, without a WAL
    return folder


class World:
    """The disk and the broker: what stays when a worker dies."""

    def __init__(self, folder: Path, applied: Path, logs=HISTORY):
        self.folder, self.logs, self.rejects = folder, logs, RejectTopic()
        self.uri = str(folder / "checkpoints")
        folder.mkdir()
        shutil.copy(applied / "online.db", folder / "online.db")
        self.store = Store(config=config(folder, applied / "registry.db"))
        self.wall, self.epochs, self.slept_s = count(WALL_US), count(1), 0.0

    def worker(self, steps: Steps | None = None, epoch=None, partitions=None, **options) -> Worker:
        steps = steps or Steps()
        self.source = Memory(self.logs)
        ticks = count()
        worker = Worker(
            options.pop("plan", PLAN),
            source=steps.watch(self.source, "poll", "commit"),
            online=steps.watch(options.pop("online", None) or OnlineSink(self.store, "activity"), "write", "sync"),
            offline=steps.watch(OfflineLog(str(self.folder / options.pop("log", "offline")), "edits", "user"), "write"),
            rejects=steps.watch(Rejecting(self.rejects), "write"),
            checkpoints=steps.watch(CheckpointStore(self.uri), "claim", "save"),
            executor=options.pop("executor", None) or Inline(),
            ticking=options.pop("ticking", False),
            wall_us=lambda: next(self.wall),
            monotonic_s=lambda: next(ticks) * 0.05 + self.slept_s,
            **options,
        )
        worker.start(dict.fromkeys(self.logs if partitions is None else partitions, epoch or next(self.epochs)))
        return worker

    def outcome(self):
        """What everybody can see: of the offline log the last row of each pane, because flushes come when they come."""
        query = "SELECT entity_key, event_us, row FROM test_activity ORDER BY 1"
        with sqlite3.connect(self.folder / "online.db") as connection:
            online = connection.execute(query).fetchall()
        offline = duckdb.sql(
            "SELECT DISTINCT ON (user, pane) * EXCLUDE (created_timestamp, event_timestamp),"
            f" date_trunc('minute', event_timestamp) AS pane FROM '{self.folder}/offline/*.parquet'"
            " ORDER BY user, pane, event_timestamp DESC, created_timestamp DESC"
        ).fetchall()
        states = CheckpointStore(self.uri)
        saved = [states.load("activity", partition) for partition in self.logs]
        rejects = sorted(set(self.rejects.found), key=lambda reject: (reject.partition, reject.offset))
        newest = [(one.offset, one.clock_us, without_wall_clock((one.state, *one.deltas)[-1])) for one in saved]
        return online, offline, newest, rejects


def without_wall_clock(state: bytes) -> bytes:
    """A state without the wall clock of its last event, the only part that two equal runs do not share."""
    return re.sub(rb'("last_event": \[\d+), \d+', rb"\1", state)


class Rejecting(RejectTopic):
    """One worker's way to the shared topic."""

    def __init__(self, topic: RejectTopic):
        self.found = topic.found


def finish(worker: Worker) -> dict:
    worker.run(threading.Event(), until_caught_up=True)
    return worker.status()


def watched_partitions(monkeypatch, steps: Steps) -> None:
    class Watched(Partition):
        def pieces(self, *args, **options):
            for rejects in super().pieces(*args, **options):
                steps.done("Partition.pieces")
                yield rejects

        def emit(self):
            emission = super().emit()
            steps.done("Partition.emit")
            return emission

    monkeypatch.setattr(worker_module, "Partition", Watched)
