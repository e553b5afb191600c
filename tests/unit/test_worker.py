"""Effectively once: a crash between any two steps, torn checkpoints and zombies change no outcome."""

import errno
import json
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kafka.errors import KafkaError

from streaming import checkpoint as checkpoint_module
from streaming import offline as offline_module
from streaming import worker as worker_module
from streaming.checkpoint import StaleEpochError
from streaming.keyed import WorkerError, check_keys
from streaming.offline import OfflineLog
from streaming.partition import Partition
from streaming.saving import SavingError
from tests.worker_world import (
    PLAN,
    START,
    Crash,
    Steps,
    World,
    batch,
    finish,
    record,
    watched_partitions,
)


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
