"""Effectively once: a crash between any two steps, torn checkpoints and zombies change no outcome."""

import errno
import json
import re
import shutil
import sqlite3
import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import duckdb
import numpy as np
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Float64, Int64, String
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kafka.errors import KafkaError
from pyarrow import fs as pafs

from streaming import checkpoint as checkpoint_module
from streaming import offline as offline_module
from streaming import worker as worker_module
from streaming.allowance import Allowance
from streaming.checkpoint import CheckpointStore, StaleEpochError
from streaming.keyed import WorkerError, check_keys
from streaming.offline import OfflineLog
from streaming.partition import Partition
from streaming.plan import Aggregate, Column, Plan
from streaming.records import RecordBatch
from streaming.saving import SavingError
from streaming.sinks import OnlineSink
from streaming.state import StateError
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


@pytest.fixture(scope="module")
def applied(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("applied")
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


@pytest.fixture
def undisturbed(tmp_path, applied):
    world = World(tmp_path / "undisturbed", applied)
    steps = Steps()
    worker = world.worker(steps)
    status = finish(worker)
    return world, steps, status


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


def test_a_run_counts_and_writes_everything(undisturbed):
    world, steps, status = undisturbed
    online, offline, saved, rejects = world.outcome()
    assert [(row["processed"], row["dead"], row["late"], row["keys"]) for row in status.values()] == [
        (17, 2, 1, 2),
        (17, 2, 1, 3),
    ]
    assert len(online) == 5
    assert len(offline) >= 5
    assert [offset for offset, _, _ in saved] == [20, 20]
    assert [(reject.kind, reject.partition, reject.offset) for reject in rejects] == [
        (kind, partition, offset) for partition in (0, 1) for kind, offset in (("dead", 4), ("dead", 11), ("late", 16))
    ]
    assert len(world.rejects.found) == len(rejects)
    assert world.source.committed == {0: 20, 1: 20}


def test_the_steps_of_a_flush_come_in_the_order_that_makes_a_crash_harmless(undisturbed):
    _, steps, _ = undisturbed
    names = steps.names
    first_save = names.index("CheckpointStore.save")
    window = [name for name in names[:first_save] if not name.endswith("claim")]
    order = ["Memory.poll", "Rejecting.write", "OnlineSink.write", "OnlineSink.sync", "OfflineLog.write"]
    assert [name for name in dict.fromkeys(window)] == order
    assert names.index("Memory.commit") > first_save


def test_a_crash_after_any_step_ends_like_an_undisturbed_run(undisturbed, tmp_path, applied, monkeypatch):
    expected_world, _, expected_status = undisturbed
    expected = expected_world.outcome()
    counting = Steps()
    watched_partitions(monkeypatch, counting)
    finish(World(tmp_path / "counting", applied).worker(counting))
    assert {"Partition.pieces", "Partition.emit"} <= set(counting.names)
    for crash_after in range(1, len(counting.names) + 1):
        world = World(tmp_path / f"crash{crash_after}", applied)
        steps = Steps(crash_after)
        watched_partitions(monkeypatch, steps)
        with pytest.raises(Crash):
            finish(world.worker(steps))
        watched_partitions(monkeypatch, Steps())
        status = finish(world.worker())
        where = f"crash after step {crash_after}, {steps.names[-1]}"
        assert world.outcome() == expected, where
        for number, row in expected_status.items():
            assert {name: status[number][name] for name in ("processed", "dead", "late", "keys", "offset")} == {
                name: row[name] for name in ("processed", "dead", "late", "keys", "offset")
            }, where


def test_a_torn_checkpoint_makes_the_one_before_serve(undisturbed):
    world, _, _ = undisturbed
    expected = world.outcome()
    for newest in {path.parent: path for path in sorted(world.folder.rglob("*.checkpoint"))}.values():
        newest.write_bytes(newest.read_bytes()[:-7])
    worker = world.worker()
    assert all(held["offset"] < 20 for held in worker.status().values())
    finish(worker)
    assert world.outcome() == expected


def test_a_zombie_is_refused_and_changes_nothing(undisturbed, tmp_path, applied):
    expected = undisturbed[0].outcome()
    world = World(tmp_path / "zombie", applied)
    zombie = world.worker()
    for _ in range(3):
        zombie.step()
    finish(world.worker())
    with pytest.raises(StaleEpochError, match="taken over by epoch 2"):
        finish(zombie)
    assert world.outcome() == expected


def test_an_empty_topic_ends_at_once_with_zeros(tmp_path, applied):
    world = World(tmp_path / "empty", applied, logs={0: []})
    status = finish(world.worker())
    assert (status[0]["processed"], status[0]["dead"], status[0]["lag"], status[0]["read"]) == (0, 0, 0, 0)


LOCKED = sqlite3.OperationalError("database is locked")
LOCKED.sqlite_errorcode = sqlite3.SQLITE_BUSY


@pytest.mark.parametrize("error", [KafkaError("no broker"), LOCKED, OSError("no space left")])
def test_what_is_away_is_tried_again_and_nothing_is_lost(undisturbed, tmp_path, applied, error, monkeypatch):
    monkeypatch.setattr(worker_module, "BACKOFF_S", (0.0, 0.0))
    expected = undisturbed[0].outcome()
    world = World(tmp_path / "away", applied)
    worker = world.worker()
    for thing, name in ((worker._rejects, "write"), (worker._online, "write")):
        failures, original = iter([error, error]), getattr(thing, name)

        def failing(*args, failures=failures, original=original):
            for failure in failures:
                raise failure
            return original(*args)

        monkeypatch.setattr(thing, name, failing)
    finish(worker)
    assert world.outcome() == expected


def test_an_idle_partition_lets_its_values_fall(tmp_path, applied):
    world = World(tmp_path / "idle", applied, logs={0: [record("ann", 0, 7)]})
    worker = world.worker(ticking=True)
    worker.step()
    assert edits_of_ann(world, worker) == 1
    world.slept_s += 11 * 60
    assert edits_of_ann(world, worker) == 0


def edits_of_ann(world, worker) -> int:
    """What the online store says after some steps in which nothing comes."""
    for _ in range(20):
        worker.step()
    worker.flush()
    return world.store.get_online_features(["activity:edits"], [{"user": "ann"}]).to_dict()["edits"][0]


@pytest.mark.parametrize("jump_s", [86_400, -86_400])
def test_a_clock_that_jumps_while_a_partition_is_idle_changes_nothing(tmp_path, applied, jump_s):
    world = World(tmp_path / "jump", applied, logs={0: [record("ann", 0, 7)]})
    worker = world.worker(ticking=True)
    worker.step()
    clock_us = worker._held[0].partition.clock_us
    world.wall = count(WALL_US + jump_s * 1_000_000)
    assert edits_of_ann(world, worker) == 1
    assert 0 < worker._held[0].partition.clock_us - clock_us < MINUTE_US
    world.slept_s += 11 * 60
    assert edits_of_ann(world, worker) == 0
    world.logs[0].append(record("ann", 10, 7))
    world.wall = count(WALL_US)
    assert edits_of_ann(world, worker) == 1
    assert worker._held[0].partition.counters.late == 0


@pytest.mark.parametrize(("silent_s", "late"), [(7_200, 0), (0, 1)])
def test_time_in_which_no_broker_answered_makes_nothing_late(tmp_path, applied, silent_s, late):
    world = World(tmp_path / "outage", applied, logs={0: [record("ann", 0, 7)]})
    worker = world.worker(ticking=True)
    worker.step()
    world.slept_s += 7_200
    world.source.silent_s += silent_s
    assert edits_of_ann(world, worker) == (1 if silent_s else 0)
    world.logs[0].append(record("ann", 30, 7))
    worker.step()
    world.logs[0].append(record("ann", 29.5, 7))
    assert edits_of_ann(world, worker) == 2 - 2 * late
    assert worker._held[0].partition.counters.late == 2 * late


def test_time_in_which_no_broker_answered_stays_left_out_for_the_next_worker(tmp_path, applied):
    world = World(tmp_path / "outage", applied, logs={0: [record("ann", 0, 7)]})
    worker = world.worker(ticking=True)
    assert edits_of_ann(world, worker) == 1
    world.slept_s, world.wall = 7_200, count(WALL_US + 7_200_000_000)
    world.source.silent_s += 7_200
    assert edits_of_ann(world, worker) == 1
    assert edits_of_ann(world, world.worker(ticking=True)) == 1


def test_records_must_be_keyed_by_the_entity():
    good = batch(0, 0, [record("ann", 0, 1), (b"x", b"{poison"), (None, None), record("bob", 1, None)])
    check_keys(PLAN, good)
    for key in (b"other", None):
        with pytest.raises(WorkerError, match="keyed by user"):
            check_keys(PLAN, batch(0, 7, [record("ann", 0, 1), (key, record("ann", 0, 1)[1])]))


def test_memory_stays_bounded_while_the_background_write_is_slow_and_polling_resumes(tmp_path, applied, monkeypatch):
    monkeypatch.setattr(worker_module, "PENDING_ROWS", 20)
    world = World(tmp_path / "slow", applied, logs={0: [record("ann", minute, 1) for minute in range(400)]})
    gate = threading.Event()

    class Slow(OfflineLog):
        def write(self, *args):
            gate.wait(30)
            super().write(*args)

    with ThreadPoolExecutor(1) as executor:
        worker = world.worker(executor=executor)
        worker._saver._offline = Slow(str(world.folder / "offline"), "edits", "user")
        for _ in range(200):
            worker.step(0.0)
        stuck_at = world.source.at[0]
        assert worker._new_rows + worker._captured_rows <= 20 + 8
        assert stuck_at < 60
        assert not list(world.folder.rglob("*.checkpoint"))
        values = world.store.get_online_features(["activity:edits"], [{"user": "ann"}]).to_dict()
        assert values["edits"] == [10], "the online store is written while the checkpoint waits"
        gate.set()
        finish(worker)
    assert world.source.at[0] == 400
    assert [row["offset"] for row in worker.status().values()] == [400]


@pytest.mark.parametrize("where", ["offline", "checkpoints"])
def test_a_full_disk_under_the_background_write_stops_nothing_and_loses_nothing(
    undisturbed, tmp_path, applied, monkeypatch, where
):
    monkeypatch.setattr(worker_module, "BACKOFF_S", (0.0, 0.0))
    expected = undisturbed[0].outcome()
    world = World(tmp_path / "full", applied)
    worker = world.worker()
    full = iter([OSError(errno.ENOSPC, "No space left on device")] * 3)
    module = checkpoint_module if where == "checkpoints" else offline_module
    original = module.write_atomic

    def failing(*args):
        for error in full:
            raise error
        return original(*args)

    monkeypatch.setattr(module, "write_atomic", failing)
    with pytest.raises(SavingError, match="No space left"):
        for _ in range(1000):
            worker.step()
    finish(worker)
    assert next(full, None) is None
    assert world.outcome() == expected


def test_deltas_are_saved_and_restored(undisturbed, tmp_path, applied, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "LARGE_BYTES", 0)
    monkeypatch.setattr(checkpoint_module, "DELTAS_SHARE", 100)
    expected = undisturbed[0].outcome()
    calls = []

    class Counting(Partition):
        def delta(self):
            calls.append(self.partition)
            return super().delta()

    monkeypatch.setattr(worker_module, "Partition", Counting)
    world = World(tmp_path / "deltas", applied)
    worker = world.worker()
    for _ in range(4):
        worker.step()
        worker.checkpoint()
    worker = world.worker()
    finish(worker)
    assert calls
    assert world.outcome() == expected


def test_partitions_move_between_workers_while_both_run(undisturbed, tmp_path, applied):
    expected = undisturbed[0].outcome()
    world = World(tmp_path / "moved", applied)
    first = world.worker(partitions=[0, 1], epoch=1)
    second = world.worker(partitions=[], epoch=2)
    for _ in range(3):
        first.step()
    first.assign({0: 1})
    first.step()
    assert list(first.status()) == [0]
    second.assign({1: 2})
    second.step()
    assert list(second.status()) == [1]
    assert second.status()[1]["epoch"] == 2
    finish(first)
    finish(second)
    assert world.outcome() == expected


def test_a_shared_worker_lets_a_partition_go_that_was_taken_over(undisturbed, tmp_path, applied):
    expected = undisturbed[0].outcome()
    world = World(tmp_path / "lost", applied)
    first = world.worker(partitions=[0, 1], epoch=1, shared=True)
    first.step()
    second = world.worker(partitions=[1], epoch=2)
    finish(second)
    finish(first)
    assert list(first.status()) == [0]
    assert world.outcome() == expected


class Fragile(Partition):
    """Raises at chosen offsets, before or after it has changed its state."""

    poison: dict[int, str] = {}

    def pieces(self, batch, now_us):
        bad = [offset for offset in batch.offsets.tolist() if offset in self.poison]
        bad = [offset for offset in bad if batch.value(offset - int(batch.offsets[0])) is not None]
        if any(self.poison[offset] == "early" for offset in bad):
            raise ZeroDivisionError("division by zero")
        yield from super().pieces(batch, now_us)
        if bad:
            raise IndexError("after the state was changed")


@pytest.mark.parametrize("kinds", [("early", "early"), ("half-way", "half-way"), ("early", "half-way")])
@pytest.mark.parametrize("batches", [1, 3])
def test_records_that_make_the_computation_raise_are_dead_lettered_alone(
    tmp_path, applied, monkeypatch, kinds, batches
):
    rows = [record("ann", 0.25 * n, n) for n in range(30)]
    poison = dict(zip((9, 18), kinds, strict=True))
    nulled = [(key, None if at in poison else value) for at, (key, value) in enumerate(rows)]
    clean = World(tmp_path / "clean", applied, logs={0: nulled})
    finish(clean.worker())
    monkeypatch.setattr(Fragile, "poison", poison)
    monkeypatch.setattr(worker_module, "Partition", Fragile)
    world = World(tmp_path / "poison", applied, logs={0: rows})
    worker = world.worker()
    world.source.batches = batches
    status = finish(worker)
    assert (status[0]["processed"], status[0]["dead"], status[0]["lag"]) == (28, 2, 0)
    (online, offline, saved, rejects), expected = world.outcome(), clean.outcome()
    assert (online, offline, saved) == expected[:3]
    assert {reject.offset for reject in rejects} == {9, 18}
    for reject in rejects:
        assert (reject.key, reject.value) == rows[reject.offset]
        assert "made the computation raise" in reject.reason
        assert ("ZeroDivisionError" if poison[reject.offset] == "early" else "IndexError") in reject.reason


@pytest.mark.parametrize("jump_us", [-3_600_000_000, 86_400_000_000])
def test_a_clock_that_jumps_changes_no_value_of_a_replayed_history(undisturbed, tmp_path, applied, jump_us):
    expected = undisturbed[0].outcome()
    world = World(tmp_path / "jump", applied)
    worker = world.worker()
    worker.step()
    world.wall = count(WALL_US + jump_us)
    finish(worker)
    online, offline, saved, rejects = world.outcome()
    assert (online, offline, rejects) == (expected[0], expected[1], expected[3])
    assert [one[:2] for one in saved] == [one[:2] for one in expected[2]]


FIELDS = {
    "user": st.sampled_from(["ann", "bob", "cyd"]) | st.text(max_size=9) | st.none() | st.integers(),
    "time": st.sampled_from([(START + timedelta(minutes=minute)).isoformat() for minute in range(-90, 90)])
    | st.integers(-(2**70), 2**70)
    | st.datetimes().map(str)
    | st.none(),
    "added": st.integers(-99, 99) | st.integers() | st.floats() | st.booleans() | st.none() | st.text(max_size=4),
    "more": st.recursive(st.none() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3), max_leaves=5),
}
STRUCTURES = st.fixed_dictionaries({}, optional=FIELDS).map(lambda event: json.dumps(event).encode()) | st.binary(
    max_size=40
)


def mutated(good: bytes, random: np.random.Generator) -> bytes:
    """One to three edits: a byte changed, a few cut out or written twice, or the end cut off."""
    value = bytearray(good)
    for _ in range(random.integers(1, 4)):
        start = int(random.integers(len(value) + 1))
        end = start + int(random.integers(1, 6))
        match random.integers(4):
            case 0:
                value[start : start + 1] = random.bytes(1)
            case 1:
                del value[start:end]
            case 2:
                value[start:start] = value[start:end]
            case _:
                del value[max(start, len(value) - 30) :]
    return bytes(value)


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(STRUCTURES, min_size=30, max_size=60, unique=True), st.integers(0, 2**32))
def test_ten_thousand_fuzzed_records_are_all_accounted_for(tmp_path_factory, applied, structures, seed):
    random = np.random.default_rng(seed)
    good = [record("ann bob cyd".split()[n % 3], 0.001 * n, n)[1] for n in range(1_000)]
    values: dict[bytes | None, None] = dict.fromkeys([*good, None, *structures])
    while len(values) < 10_000:
        values[mutated([*good, *structures][random.integers(len(good) + len(structures))], random)] = None
    world = World(tmp_path_factory.mktemp("fuzz") / "world", applied, logs={0: [(b"k", value) for value in values]})
    worker = world.worker()
    world.source.polled = 1_000
    row = finish(worker)[0]
    assert row["processed"] + row["late"] + row["dead"] == len(values) == 10_000
    assert row["processed"] >= len(good) and row["dead"] > 1_000
    refused = {reject.offset: reject for reject in world.rejects.found}
    assert len(refused) == len(world.rejects.found) == row["late"] + row["dead"]
    for offset, value in enumerate(values):
        if offset in refused:
            assert refused[offset].value == value


LONGER = replace(PLAN, aggregates=(PLAN.aggregates[0], replace(PLAN.aggregates[1], window_us=5 * MINUTE_US)))


def test_a_changed_view_is_refused_with_what_changed_and_nothing_is_touched(undisturbed):
    world, _, _ = undisturbed
    running = world.worker()
    before = {
        path: path.read_bytes() for path in world.folder.rglob("*") if path.is_file() and "online" not in str(path)
    }
    sentence = (
        "'activity' has checkpoints of another declaration.*: aggregation mean of 'added' over 2m every 1m became"
        " mean of 'added' over 5m every 1m. .*--reset activity"
    )
    with pytest.raises(StateError, match=sentence):
        world.worker(plan=LONGER)
    assert {path: path.read_bytes() for path in before} == before
    running.checkpoint()
    assert all(row["offset"] == 20 for row in running.status().values()), "the one that runs is not fenced"


def test_names_of_features_may_change(undisturbed):
    world, _, _ = undisturbed
    renamed = tuple(replace(each, name=f"{each.name}_new") for each in PLAN.aggregates)
    worker = world.worker(plan=replace(PLAN, aggregates=renamed))
    assert [row["offset"] for row in worker.status().values()] == [20, 20]


def test_a_reset_view_ends_as_if_it_had_always_been_so_and_its_past_is_kept(undisturbed, tmp_path, applied):
    fresh = World(tmp_path / "fresh", applied)
    finish(fresh.worker(plan=LONGER))
    world, _, _ = undisturbed
    checkpoints = {path.name: path.read_bytes() for path in world.folder.rglob("*.checkpoint")}
    parts = {path.name: path.read_bytes() for path in (world.folder / "offline").glob("*.parquet")}
    assert len(CheckpointStore(world.uri).reset("activity")) == 2
    finish(world.worker(plan=LONGER, epoch=3))
    online, offline, saved, _ = world.outcome()
    assert (offline, saved) == fresh.outcome()[1:3]
    for (entity, event_us, row), (fresh_entity, fresh_us, fresh_row) in zip(online, fresh.outcome()[0], strict=True):
        assert (entity, row) == (fresh_entity, fresh_row) or event_us > fresh_us, "only the guard keeps an older value"
    aside = {path.name: path.read_bytes() for path in world.folder.rglob("reset-*/*.checkpoint")}
    assert aside == checkpoints
    assert {path.name: path.read_bytes() for path in world.folder.rglob("before-*/*.parquet")} == parts


class Nowhere:
    """An online store of which nothing is read."""

    def write(self, emissions):
        pass

    def sync(self):
        pass


def test_another_view_beside_disturbs_nothing(undisturbed):
    world, _, _ = undisturbed
    expected = world.outcome()
    folder = world.folder / "checkpoints" / "activity"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = world.worker(plan=replace(LONGER, view="other"), log="other", online=Nowhere())
    finish(other)
    assert [row["processed"] for row in other.status().values()] == [17, 17]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [row["offset"] for row in world.worker().status().values()] == [20, 20]
    assert world.outcome()[:3] == expected[:3]


@pytest.mark.parametrize("kind", ["file", "mock"])
def test_checkpoints_may_lie_anywhere(undisturbed, tmp_path, applied, monkeypatch, kind):
    expected = undisturbed[0].outcome()
    world = World(tmp_path / "elsewhere", applied)
    world.uri = f"file://{tmp_path}/far/away"
    if kind == "mock":
        mock, _ = pafs.FileSystem.from_uri("mock:///")
        mock.create_dir("far")
        monkeypatch.setattr(checkpoint_module, "filesystem", lambda uri: (mock, "far"))
    with pytest.raises(Crash):
        finish(world.worker(Steps(20)))
    finish(world.worker())
    assert world.outcome() == expected
    assert not list(world.folder.rglob("*.checkpoint"))
    assert bool(list((tmp_path / "far").rglob("*.checkpoint"))) == (kind == "file")


def test_a_topic_that_was_never_checkpointed_may_be_declared_anew(tmp_path, applied):
    world = World(tmp_path / "new", applied, logs={0: []})
    world.worker()
    assert world.worker(plan=LONGER).holds() == {0}


def test_partitions_share_the_memory_of_their_worker(tmp_path, applied):
    users = {number: [record(f"user {number} {n}", n / 100, 1) for n in range(2_000)] for number in (0, 1)}
    sizes = []
    for logs in ({0: users[0]}, users):
        world = World(tmp_path / f"{len(logs)}", applied, logs=logs)
        worker = world.worker()
        finish(worker)
        sizes.append(sum(row["state_bytes"] for row in worker.status().values()))
    limit = (sizes[0] + sizes[1]) // 2
    finish(World(tmp_path / "alone", applied, logs={0: users[0]}).worker(allowance=Allowance(limit)))
    both = World(tmp_path / "both", applied, logs=users).worker(allowance=Allowance(limit))
    with pytest.raises(StateError, match="others of its worker take"):
        finish(both)
