"""What counts as silence of the entities of a worker: no step of the wall clock, no outage of the broker."""

from itertools import count

import pytest

from tests.worker_world import MINUTE_US, WALL_US, World, finish, record


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
