"""A worker whose view was changed, reset or declared anew, and where its checkpoints lie."""

from dataclasses import replace

import pytest
from pyarrow import fs as pafs

from streaming import checkpoint as checkpoint_module
from streaming.allowance import Allowance
from streaming.checkpoint import CheckpointStore
from streaming.state import StateError
from tests.worker_world import MINUTE_US, PLAN, Crash, Steps, World, finish, record

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
