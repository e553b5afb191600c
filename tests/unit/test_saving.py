"""The background half of a checkpoint: when offline parts are merged, and up to where."""

from concurrent.futures import Executor, Future

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from streaming.checkpoint import CheckpointStore
from streaming.offline import OfflineLog
from streaming.records import Emission
from streaming.saving import COMPACT_S, Captured, Saver


class Inline(Executor):
    """Runs a job where it is submitted: the order of threads is not what is tested."""

    def submit(self, function, /, *arguments, **options):
        done = Future()
        try:
            done.set_result(function(*arguments, **options))
        except OSError as error:
            done.set_exception(error)
        return done


class Online:
    """Stands for a store, which has nothing to make durable here."""

    def sync(self):
        pass


class Log(OfflineLog):
    """Keeps what it was asked to merge."""

    def __init__(self, folder):
        super().__init__(str(folder), "topic", "user")
        self.compacted = []
        self.full = False

    def compact(self, partition, offset, clock_us):
        self.compacted.append((partition, offset, clock_us))
        if self.full:
            raise OSError("no space left")
        return super().compact(partition, offset, clock_us)


def captured(number, delta=False):
    features = pa.table({"n": pa.array([number], pa.int64())})
    rows = [(Emission(pa.array(["a"]), np.array([number * 1000]), features), number)]
    return Captured(0, 1, 10 * number, 10 * number + 10, number * 1000, rows, b"state", delta)


def saver(tmp_path, now):
    offline, checkpoints = Log(tmp_path / "log"), CheckpointStore(str(tmp_path / "checkpoints"))
    checkpoints.claim("stream", 0, 1)
    options = {"online": Online(), "offline": offline, "checkpoints": checkpoints, "executor": Inline()}
    return Saver("stream", **options, monotonic_s=lambda: now[0]), offline


def save(saves, one):
    saves.begin([one])
    assert saves.collect().offsets == {0: one.next_offset}


def test_parts_are_merged_once_a_minute_up_to_a_state_that_no_restart_goes_behind(tmp_path):
    now = [0.0]
    saves, offline = saver(tmp_path, now)
    for number in range(12):
        save(saves, captured(number))
    assert offline.compacted == []
    now[0] = COMPACT_S
    save(saves, captured(12, delta=True))
    assert offline.compacted == [(0, 110, 10_000)]  # states 10 and 11 are whole; 12 builds on 11
    save(saves, captured(13))
    assert len(offline.compacted) == 1
    now[0] = 2 * COMPACT_S
    save(saves, captured(14))
    assert offline.compacted[1:] == [(0, 140, 13_000)]
    assert set(pq.read_table(tmp_path / "log").column("n").to_pylist()) == set(range(15))


def test_parts_that_cannot_be_merged_hold_up_nothing(tmp_path):
    now = [0.0]
    saves, offline = saver(tmp_path, now)
    save(saves, captured(0))
    save(saves, captured(1))
    now[0], offline.full = COMPACT_S, True
    save(saves, captured(2))
    assert len(offline.compacted) == 1
