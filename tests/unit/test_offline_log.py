"""The offline log: named by offsets, replaced when written again, cut back to the checkpoint, merged without a loss."""

from pathlib import Path
from types import SimpleNamespace

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from feast import FileSource
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming import offline
from streaming.offline import OfflineLog
from streaming.records import Emission
from streaming.views import log_place

UNDER_HOME = ("/home/features/offline/view", "event_timestamp", "created_timestamp")


def emission(entities: list[str], at_us: int, counts: list[int]) -> Emission:
    features = pa.table({"edits": pa.array(counts, pa.int64())})
    return Emission(pa.array(entities, pa.string()), np.full(len(entities), at_us, dtype=np.int64), features)


def query(sql: str) -> list[tuple]:
    """Rows; without duckdb's cache, which takes a file for unchanged that was replaced within the same second."""
    with duckdb.connect(config={"enable_external_file_cache": "false"}) as connection:
        return connection.sql(sql).fetchall()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_parts_hold_the_rows_and_are_read_by_a_glob(tmp_path):
    log = OfflineLog(str(tmp_path), "edits", "user")
    log.write(0, 500, 1500, 9, [(emission(["a", "b"], 1_000_000, [1, 2]), 77), (emission(["a"], 2_000_000, [3]), 78)])
    log.write(1, 0, 10, 9, [(emission([], 0, []), 79)])
    assert names(tmp_path) == ["edits-00000-500-1500.parquet"]
    rows = f"SELECT user, edits, epoch_us(event_timestamp), epoch_us(created_timestamp) FROM '{tmp_path}/*.parquet'"
    assert query(rows) == [("a", 1, 1_000_000, 77), ("b", 2, 1_000_000, 77), ("a", 3, 2_000_000, 78)]


def test_writing_a_range_again_replaces_it(tmp_path):
    log = OfflineLog(str(tmp_path), "edits", "user")
    for count in (1, 2):
        log.write(0, 0, 10, 9, [(emission(["a"], 1, [count]), 5)])
    assert query(f"SELECT edits FROM '{tmp_path}/*.parquet'") == [(2,)]


def test_parts_beyond_the_checkpoint_are_removed(tmp_path):
    log = OfflineLog(str(tmp_path), "edits", "user")
    row = [(emission(["a"], 1, [1]), 5)]
    for partition, first, next_offset, clock_us in ((0, 0, 10, 1), (0, 10, 20, 2), (0, 20, 30, 3), (1, 0, 40, 1)):
        log.write(partition, first, next_offset, clock_us, row)
    log.write(0, 20, 20, 100, row)
    log.write(0, 20, 20, 200, row)
    others = [f"edits-00001-0-9.parquet.{'0' * 32}.tmp", "somebody-elses.parquet"]
    for name in (*others, f"edits-00000-30-40.parquet.{'0' * 32}.tmp"):
        (tmp_path / name).touch()
    assert log.truncate(0, 20, 100) == 2
    assert names(tmp_path) == sorted(
        [
            "edits-00000-0-10.parquet",
            "edits-00000-10-20.parquet",
            "edits-00000-20-20-100.parquet",
            "edits-00001-0-40.parquet",
            *others,
        ]
    )


def distinct(folder) -> list[tuple]:
    return query(
        f"SELECT DISTINCT user, edits, epoch_us(event_timestamp), epoch_us(created_timestamp) FROM '{folder}/*.parquet'"
        " ORDER BY ALL"
    )


def written(folder, parts: int, partition: int = 0) -> OfflineLog:
    log = OfflineLog(str(folder), "edits", "user")
    for part in range(parts):
        log.write(partition, 10 * part, 10 * part + 10, part, [(emission(["a", "b"], part, [part, -part]), 100 + part)])
    return log


def test_merged_parts_stay_until_the_next_call_and_hold_every_row(tmp_path):
    log = written(tmp_path, 20)
    written(tmp_path, 20, partition=1)
    rows = distinct(tmp_path)
    assert log.compact(0, 150, 14) == 15
    assert "edits-00000-0-150-merged.parquet" in names(tmp_path)
    assert (len(names(tmp_path)), distinct(tmp_path)) == (41, rows)
    assert log.compact(0, 150, 14) == 0
    assert (len(names(tmp_path)), distinct(tmp_path)) == (26, rows)
    count = f"SELECT count(*) FROM '{tmp_path}/edits-00000-*.parquet'"
    assert query(count) == [(40,)]
    for part in range(20, 40):
        log.write(0, 10 * part, 10 * part + 10, part, [(emission(["a"], part, [part]), 100 + part)])
    assert log.compact(0, 400, 39) == 26
    log.compact(0, 400, 39)
    assert [name for name in names(tmp_path) if name.startswith("edits-00000")] == ["edits-00000-0-400-merged.parquet"]


def test_big_parts_are_left_alone(tmp_path, monkeypatch):
    log = written(tmp_path, 9)
    size = max(path.stat().st_size for path in tmp_path.iterdir())
    monkeypatch.setattr(offline, "MERGED_BYTES", 8 * size)
    monkeypatch.setattr(offline, "SMALL_BYTES", 0)
    assert log.compact(0, 1_000, 0) == 8
    monkeypatch.setattr(offline, "MERGED_BYTES", 0)
    assert log.compact(0, 1_000, 0) == 0


def test_a_merged_part_beyond_the_checkpoint_is_kept_under_another_name(tmp_path, caplog):
    log = written(tmp_path, 10)
    rows = distinct(tmp_path)
    log.compact(0, 100, 9)
    assert log.truncate(0, 55, 5) == 0
    assert names(tmp_path) == ["kept-edits-00000-0-100-merged.parquet"]
    assert "beyond the checkpoint" in caplog.text
    written(tmp_path, 10).compact(0, 100, 9)
    assert log.truncate(0, 0, -1) == 1
    assert (names(tmp_path), distinct(tmp_path)) == (["kept-edits-00000-0-100-merged.parquet"], rows)


class Crash(Exception):
    pass


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 2)),
        st.tuples(st.sampled_from(["compact", "restart"]), st.integers(0, 12)),
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=40)
@given(steps=STEPS)
def test_no_row_is_lost_or_made_twice_whatever_crashes_in_between(tmp_path_factory, steps):
    """Rows up to the last checkpoint stay, rows beyond it go; `restart` falls back to one of the two checkpoints."""
    folder = tmp_path_factory.mktemp("log")
    log = OfflineLog(str(folder), "edits", "user")
    checkpoints, rows, made = [(0, offline.NO_CLOCK, 0)] * 2, [], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline, "FEWEST_PARTS", 3)
        for step, number in steps:
            offset, clock_us, kept = checkpoints[-1]
            if step == "write":
                made += 1
                row = (f"u{made}", made, clock_us_of(made), made)
                log.write(0, offset, offset + number, made, [(emission([row[0]], row[2], [made]), made)])
                rows = [*rows[:kept], row]
                checkpoints = [checkpoints[-1], (offset + number, made, len(rows))]
            elif step == "compact":
                crashing(log, number, lambda at=checkpoints[0], log=log: log.compact(0, *at[:2]))
            else:
                checkpoints = [checkpoints[number % 2]] * 2
                log = OfflineLog(str(folder), "edits", "user")
                at = checkpoints[0]
                crashing(log, number, lambda at=at, log=log: log.truncate(0, *at[:2]))
                log = OfflineLog(str(folder), "edits", "user")
                log.truncate(0, *at[:2])
                rows = rows[: at[2]]
            expected = sorted(rows)
            assert (distinct(folder) if names(folder) else []) == expected
    log.truncate(0, *checkpoints[1][:2])
    if rows:
        assert query(f"SELECT count(*) FROM '{folder}/*.parquet'") == [(len(rows),)]


def clock_us_of(made: int) -> int:
    return 1_000 * made


def crashing(log: OfflineLog, after: int, work) -> None:
    """Do the work on a file system that fails after some changes."""
    left = [after]

    class Failing:
        def __getattr__(self, name):
            found = getattr(real, name)
            if name not in ("delete_file", "move"):
                return found
            left[0] -= 1
            if left[0] < 0:
                raise Crash
            return found

    real, log._fs = log._fs, Failing()
    try:
        work()
    except Crash:
        pass
    finally:
        log._fs = real


def test_a_view_that_gains_a_feature_gives_old_parts_its_column(tmp_path, caplog):
    caplog.set_level("INFO")
    written(tmp_path, 10).compact(0, 100, 9)
    later = OfflineLog(str(tmp_path), "edits", "user")
    features = pa.table({"mean": [0.5], "edits": [7.5]})
    later.write(0, 100, 110, 9, [(Emission(pa.array(["a"]), np.array([10]), features), 200)])
    assert "parts given the view's columns" in caplog.text
    found = query(f"SELECT mean, edits FROM '{tmp_path}/*.parquet' WHERE user = 'a' ORDER BY event_timestamp")
    assert found[-1] == (0.5, 7.5)
    assert {mean for mean, _ in found[:-1]} == {None}
    later.compact(0, 110, 9)
    assert query(f"SELECT count(*) FROM '{tmp_path}/*.parquet'") == [(21,)]
    wrong = pa.table({"mean": ["high"], "edits": [1.0]})
    later.write(0, 110, 120, 9, [(Emission(pa.array(["a"]), np.array([11]), wrong), 201)])
    text = OfflineLog(str(tmp_path), "edits", "user")
    assert text.align(0, pa.schema([("user", pa.string()), ("edits", pa.list_(pa.int64()))])) == 0
    assert "does not fit the view" in caplog.text


@pytest.mark.parametrize(
    ("source", "place"),
    [
        (FileSource(path="data/a/*.parquet", timestamp_field="at"), ("/repo/data/a", "at", "created_timestamp")),
        (FileSource(path="/a/*.parquet", timestamp_field="at", created_timestamp_column="made"), ("/a", "at", "made")),
        (FileSource(path="s3://logs/a/*.parquet"), ("s3://logs/a", "event_timestamp", "created_timestamp")),
        (FileSource(path="data/a.parquet", timestamp_field="at"), UNDER_HOME),
        (None, UNDER_HOME),
    ],
)
def test_the_log_is_where_the_view_says_or_under_home(source, place):
    # Stands for a Feast store: Feast makes no view without a batch source, but a registry can hold one.
    store = SimpleNamespace(repo_path="/repo", get_stream_feature_view=lambda _: SimpleNamespace(batch_source=source))
    assert log_place(store, "view", Path("/home")) == place
