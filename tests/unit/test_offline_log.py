"""The offline log: named by offsets, replaced when written again, cut back to the checkpoint."""

import duckdb
import numpy as np
import pyarrow as pa

from streaming.offline import OfflineLog
from streaming.records import Emission


def emission(entities: list[str], at_us: int, counts: list[int]) -> Emission:
    features = pa.table({"edits": pa.array(counts, pa.int64())})
    return Emission(pa.array(entities, pa.string()), np.full(len(entities), at_us, dtype=np.int64), features)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_parts_hold_the_rows_and_are_read_by_a_glob(tmp_path):
    log = OfflineLog(str(tmp_path), "edits", "user")
    log.write(0, 500, 1500, 9, [(emission(["a", "b"], 1_000_000, [1, 2]), 77), (emission(["a"], 2_000_000, [3]), 78)])
    log.write(1, 0, 10, 9, [(emission([], 0, []), 79)])
    assert names(tmp_path) == ["edits-00000-500-1500.parquet"]
    query = f"SELECT user, edits, epoch_us(event_timestamp), epoch_us(created_timestamp) FROM '{tmp_path}/*.parquet'"
    assert duckdb.sql(query).fetchall() == [("a", 1, 1_000_000, 77), ("b", 2, 1_000_000, 77), ("a", 3, 2_000_000, 78)]


def test_writing_a_range_again_replaces_it(tmp_path):
    log = OfflineLog(str(tmp_path), "edits", "user")
    for count in (1, 2):
        log.write(0, 0, 10, 9, [(emission(["a"], 1, [count]), 5)])
    assert duckdb.sql(f"SELECT edits FROM '{tmp_path}/*.parquet'").fetchall() == [(2,)]


def test_parts_beyond_the_checkpoint_are_removed(tmp_path):
    log = OfflineLog(str(tmp_path), "edits", "user")
    row = [(emission(["a"], 1, [1]), 5)]
    for partition, first, next_offset, clock_us in ((0, 0, 10, 1), (0, 10, 20, 2), (0, 20, 30, 3), (1, 0, 40, 1)):
        log.write(partition, first, next_offset, clock_us, row)
    log.write(0, 20, 20, 100, row)
    log.write(0, 20, 20, 200, row)
    (tmp_path / "somebody-elses.parquet").touch()
    assert log.truncate(0, 20, 100) == 2
    assert names(tmp_path) == [
        "edits-00000-0-10.parquet",
        "edits-00000-10-20.parquet",
        "edits-00000-20-20-100.parquet",
        "edits-00001-0-40.parquet",
        "somebody-elses.parquet",
    ]
