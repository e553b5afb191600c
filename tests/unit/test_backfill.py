"""A backfill against one partition that takes everything: neither shards nor chunks nor formats change a bit."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming import backfill, history
from streaming import entities as entities_module
from streaming.arrow_columns import TableError
from streaming.backfill import Backfilled, BackfillError, Output
from streaming.history import HistoryError
from streaming.partition import Partition
from streaming.plan import Aggregate, Column, Plan
from streaming.records import RecordBatch

SECOND = 1_000_000
NOW_US = 2_000_000_000 * SECOND
COLUMNS = (Column("x", "double", nullable=True),)
AGGREGATES = tuple(
    Aggregate(f"{function}_{window}", "x", function, window * SECOND, slide * SECOND)  # type: ignore[arg-type]
    for window, slide in ((60, 10), (30, 30))
    for function in ("count", "sum", "mean")
)
PLAN = Plan("view", "topic", "", "user", "string", "time", COLUMNS, AGGREGATES, 15 * SECOND)
LASTING = (Aggregate("lifetime", "x", "sum", kind="lifetime"), Aggregate("last", "x", "mean", kind="last", size=9))
FORGETFUL = replace(PLAN, aggregates=(*AGGREGATES, *LASTING), idle_ttl_us=7 * SECOND)


def output(folder: Path) -> Output:
    return Output(str(folder), "event_timestamp", "created_timestamp", NOW_US)


def events(count: int, seed: int = 1, disorder_s: int = 40) -> list[dict[str, Any]]:
    """A few events a second, out of order by up to `disorder_s`, so that some are late."""
    random = np.random.default_rng(seed)
    times = np.linspace(0, count / 3, count) - random.uniform(0, disorder_s, count) * (random.random(count) < 0.2)
    return [
        {
            "time": f"{np.datetime64('2024-05-01') + np.timedelta64(int(time * 1e6), 'us')}Z",
            "user": f"user {random.zipf(1.4) % 17}",
            "x": None if random.random() < 0.1 else float(random.normal() * 10.0 ** random.integers(-3, 9)),
        }
        for time in times
    ]


def write_parquet(path: Path, rows: list[dict[str, Any]], row_group_size: int = 100) -> Path:
    table = pa.table(
        {
            "user": [row["user"] for row in rows],
            "x": pa.array([row["x"] for row in rows], pa.float64()),
            "time": pa.array([np.datetime64(row["time"][:-1], "us") for row in rows], pa.timestamp("us")),
        }
    )
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def write_lines(path: Path, rows: list[dict[str, Any]], end: str = "\n") -> Path:
    data = "".join(json.dumps(row) + end for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def run(source: Path, folder: Path, shards: int = 1, plan: Plan = PLAN) -> tuple[Backfilled, list[tuple]]:
    backfill.prepare(output(folder))
    done = backfill.run(plan, history.pieces(plan, str(source)), output(folder), shards)
    return done, emitted(folder)


def emitted(folder: Path) -> list[tuple]:
    """All rows by time and entity, floats as their bits."""
    parts = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    if not parts:
        return []
    whole = pa.concat_tables(parts).sort_by([("event_timestamp", "ascending"), ("user", "ascending")])
    return [tuple(v.hex() if isinstance(v, float) else v for v in row.values()) for row in whole.to_pylist()]


def reference(rows: list[dict[str, Any]], plan: Plan = PLAN) -> list[tuple]:
    """What one partition emits that gets one record after the other and is asked when its pane changes."""
    partition = Partition(plan, 0)
    found: list[tuple] = []

    def take() -> None:
        emission = partition.emit()
        features = zip(*(column.to_pylist() for column in emission.features.columns), strict=True)
        for user, time_us, values in zip(emission.entities.to_pylist(), emission.event_time_us, features, strict=True):
            found.append((int(time_us), user, *(v.hex() if isinstance(v, float) else v for v in values)))

    for row, event in enumerate(rows):
        data = json.dumps(event).encode()
        time_us = int((np.datetime64(event["time"][:-1], "us") - np.datetime64(0, "us")).astype(np.int64))
        if row and time_us // (10 * SECOND) > partition.clock_us // (10 * SECOND):
            take()
        spans = np.array([[0, len(data)]], dtype=np.int64)
        one = np.array([row], dtype=np.int64)
        buffer = np.frombuffer(data, dtype=np.uint8)
        partition.process(RecordBatch(0, buffer, one, spans - spans - 1, spans, one), NOW_US)
    take()
    return sorted(found)


def comparable(rows: list[tuple]) -> list[tuple]:
    return [(int(row[-2].timestamp() * 1e6 + 0.5), row[0], *row[1:-2]) for row in rows]


def test_rows_are_those_of_a_partition_that_is_fed_record_by_record(tmp_path):
    rows = events(900)
    done, got = run(write_parquet(tmp_path / "in.parquet", rows), tmp_path / "out")
    expected = reference(rows)
    assert sorted(comparable(got)) == expected
    assert done.rows == len(expected) and done.events == 900 and done.dead == 0 and done.late > 10
    late = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert len(late) == done.late and {each["kind"] for each in late} == {"late"}
    assert [each["offset"] for each in late] == sorted(each["offset"] for each in late)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shards=st.integers(2, 5),
    chunk=st.integers(1, 200),
    group=st.integers(20, 400),
    kind=st.sampled_from(["in.parquet", "in.jsonl", "in.jsonl.gz"]),
    what=st.sampled_from([PLAN, FORGETFUL, replace(FORGETFUL, clocks="key")]),
)
def test_shards_chunks_and_formats_change_no_bit(tmp_path_factory, seed, shards, chunk, group, kind, what):
    folder, rows = tmp_path_factory.mktemp("backfill"), events(300, seed)
    done, whole = run(write_parquet(folder / "whole.parquet", rows, 1000), folder / "whole", plan=what)
    write = write_lines if "jsonl" in kind else lambda path, rows: write_parquet(path, rows, group)
    write(folder / kind, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "ROWS_A_CHUNK", chunk)
        patch.setattr(history, "BYTES_A_CHUNK", 7 * chunk)
        patch.setattr(backfill, "ROWS_A_PART", 50)
        patch.setattr(entities_module, "_FEW", 1)
        again, parts = run(folder / kind, folder / "parts", shards, what)
    assert parts == whole
    assert again._replace(keys=done.keys) == done and again.keys <= done.keys  # some may be forgotten


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    rows = events(300)
    source = tmp_path / "in"
    source.mkdir()
    write_lines(source / "a.jsonl", rows[:100])
    write_lines(source / "b.jsonl.gz", rows[100:150])
    write_lines(source / "c.ndjson", rows[150:])
    (source / "_SUCCESS").touch()
    assert run(source, tmp_path / "out")[1] == run(write_parquet(tmp_path / "x.parquet", rows), tmp_path / "other")[1]


def test_lines_of_any_ending_and_broken_ones(tmp_path):
    rows = events(50, disorder_s=0)
    path = write_lines(tmp_path / "in.jsonl", rows[:25], "\r\n\n")
    bad = b'{"user": "a", "time": 5\n\nnull\n{"user": "a", "time": "1999"}'
    path.write_bytes(path.read_bytes() + write_lines(tmp_path / "x.jsonl", rows[25:]).read_bytes() + bad)
    done, got = run(path, tmp_path / "out", 3)
    assert sorted(comparable(got)) == reference(rows)
    assert (done.events, done.dead, done.late) == (53, 3, 0)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    data = path.read_bytes()
    for reject in rejects:
        assert data[reject["offset"] :].startswith(reject["value"].encode())
    assert "is not JSON" in rejects[0]["reason"] and rejects[1]["reason"] == "the value is null, not a JSON object"


def test_rows_that_cannot_be_read_are_kept_with_their_reason(tmp_path):
    rows = events(40, disorder_s=0)
    table = pq.read_table(write_parquet(tmp_path / "x.parquet", rows))
    table = table.set_column(0, "user", pa.array([None if row == 7 else rows[row]["user"] for row in range(40)]))
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=9)
    done, _ = run(tmp_path / "in.parquet", tmp_path / "out", 4)
    (line,) = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "kind": "dead",
        "partition": 0,
        "offset": 7,
        "reason": "field 'user' is null",
        "key": None,
        "value": None,
    }
    assert (done.events, done.dead) == (40, 1)


def test_an_input_without_events_writes_nothing(tmp_path):
    (tmp_path / "in.jsonl").touch()
    assert run(tmp_path / "in.jsonl", tmp_path / "out", 2) == (Backfilled(0, 0, 0, 0, 0), [])


def test_output_has_the_schema_of_the_offline_log(tmp_path):
    run(write_parquet(tmp_path / "in.parquet", events(60)), tmp_path / "out")
    schema = pq.read_schema(next((tmp_path / "out").glob("*.parquet")))
    assert schema.names == ["user", *(a.name for a in AGGREGATES), "event_timestamp", "created_timestamp"]
    assert schema.field("event_timestamp").type == pa.timestamp("us", "UTC") == schema.field("created_timestamp").type


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.parquet", None, "There is no input"),
        ("in.csv", b"a,b", "must be .parquet, or .jsonl or .jsonl.gz files: it is in.csv."),
        ("in.parquet", b"no parquet", "is no Parquet file"),
        ("in.jsonl.gz", gzip.compress(b"{}\n" * 100, mtime=0)[:-20], "is no whole gzip file"),
    ],
)
def test_an_input_that_cannot_be_read_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(HistoryError, match=message):
        run(tmp_path / name, tmp_path / "out")


def test_a_table_without_the_columns_of_the_view_is_refused(tmp_path):
    pq.write_table(pa.table({"user": ["a"]}), tmp_path / "in.parquet")
    with pytest.raises(TableError, match="has no column 'time'"):
        run(tmp_path / "in.parquet", tmp_path / "out")


def test_more_state_than_the_limit_ends_the_backfill_with_a_sentence(tmp_path):
    rows = [{"time": "2024-05-01T00:00:00Z", "user": f"user {number}", "x": 1.0} for number in range(20_000)]
    source = write_parquet(tmp_path / "in.parquet", rows, 5_000)
    message = r"holds \d+,000 entities in share 1 of 1: .* more than the 2 MiB that it may take are needed"
    with pytest.raises(BackfillError, match=message):
        backfill.run(PLAN, history.pieces(PLAN, str(source)), output(tmp_path), max_state_bytes=2 << 20)


def test_partitions_share_the_memory_of_their_backfill(tmp_path):
    def chunk(number):
        values = [json.dumps({"time": "2024-05-01T00:00:00Z", "user": str(user), "x": 1.0}) for user in range(5_000)]
        batch = RecordBatch.of_values([value.encode() for value in values], 0)._replace(partition=number)
        return next(iter(history.decoded(PLAN, batch)))

    alone = Partition(PLAN, 0)
    list(alone.add(chunk(0).columns, chunk(0).offsets, NOW_US))
    shard = backfill.Shard(PLAN, 0, 1, output(tmp_path), max_state_bytes=3 * alone.state_bytes // 2)
    shard.add(chunk(0))
    with pytest.raises(BackfillError, match="holds 10,000 entities"):
        shard.add(chunk(1))


def test_an_output_that_holds_parquet_files_is_refused(tmp_path):
    write_parquet(tmp_path / "in.parquet", events(5))
    with pytest.raises(BackfillError, match="holds Parquet files already"):
        backfill.prepare(output(tmp_path))
