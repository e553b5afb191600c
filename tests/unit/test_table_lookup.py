"""The look-up in a table with history against `pandas.merge_asof`, and what happens when its files change."""

import json
import logging
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streaming.deriving.derivation import Derivation, Input, Table
from streaming.deriving.table_lookup import LOOK_US, TableLookup
from streaming.plan import PlanError
from streaming.records import RecordBatch

NOW_US = 10**12
EDITS = Input("edits", "edits", "", "user string, time timestamp, n bigint", "time", 0)
SCHEMA = "user string, since timestamp, plan string, limit double"


def derivation(path: Path | str, schema: str = SCHEMA, source: Input = EDITS) -> Derivation:
    table = Table("accounts", str(path), "since", schema)
    return Derivation("described", "table_lookup", (source,), "user", "", 0, on="user", table=table)


def write(path: Path, rows: list[tuple[str | int | None, int | None, str | None]]) -> None:
    users, since_ms, plans = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    kind = pa.int64() if users and isinstance(users[0], int) else pa.string()
    columns = {
        "user": pa.array(users, kind),
        "since": pa.array(since_ms, pa.int64()).cast(pa.timestamp("ms")),
        "plan": pa.array(plans, pa.string()),
        "limit": pa.array([len(rows) + 0.5] * len(rows), pa.float64()),
        "unread": pa.array([b"x"] * len(rows), pa.binary()),
    }
    pq.write_table(pa.table(columns), path)


def edit(user: str | int, time_ms: int, number: int = 0) -> bytes:
    return json.dumps({"user": user, "time": time_ms, "n": number}).encode()


def look_up(lookup: TableLookup, values: list[bytes], now_us: int = NOW_US) -> list[dict]:
    return [json.loads(value) for value in lookup.process(0, RecordBatch.of_values(values, 0), now_us).values]


def plans(lookup: TableLookup, *events: bytes, now_us: int = NOW_US) -> list[str | None]:
    return [event["accounts_plan"] for event in look_up(lookup, list(events), now_us)]


USERS = st.sampled_from(["a", "b", "é", ""])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    versions=st.lists(st.tuples(USERS, st.integers(0, 30)), max_size=20),
    edits=st.lists(st.tuples(USERS | st.just("nobody"), st.integers(0, 30)), min_size=1, max_size=20),
)
def test_each_event_gets_the_version_that_merge_asof_gives(tmp_path, versions, edits):
    path = tmp_path / "accounts.parquet"
    write(path, [(*version, f"plan {n}") for n, version in enumerate(versions)])
    found = plans(TableLookup(derivation(path)), *(edit(*each) for each in edits))
    left = pd.DataFrame(edits, columns=["user", "t"]).rename_axis("n").reset_index().sort_values("t", kind="stable")
    right = pd.DataFrame(versions, columns=["user", "t"]).astype({"user": object, "t": "int64"})
    right["plan"] = [f"plan {n}" for n in range(len(right))]
    expected = pd.merge_asof(left, right.sort_values("t", kind="stable"), on="t", by="user").sort_values("n")
    assert found == [None if pd.isna(plan) else plan for plan in expected.plan]


def test_what_comes_out_is_the_event_and_the_row_with_its_values(tmp_path):
    path = tmp_path / "accounts.parquet"
    write(path, [("ann", 1_500, 'a "b"'), ("ann", None, "x"), (None, 1, "y")])
    given_ = TableLookup(derivation(path)).process(0, RecordBatch.of_values([edit("ann", 2_000) + b" \n"], 0), NOW_US)
    assert given_.keys == [b"ann"]
    assert given_.values == [
        b'{"user": "ann", "time": 2000, "n": 0,"accounts_user":"ann","accounts_since":"1970-01-01T00:00:01.500000Z",'
        b'"accounts_plan":"a \\"b\\"","accounts_limit":3.5}'
    ]


def test_integer_keys_and_time_zones(tmp_path):
    path = tmp_path / "accounts.parquet"
    since = pa.array([datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)] * 2, pa.timestamp("ns", "Europe/Berlin"))
    pq.write_table(pa.table({"user": pa.array([7, -7], pa.int32()), "since": since, "plan": ["one", "two"]}), path)
    source = replace(EDITS, schema="user bigint, time timestamp")
    lookup = TableLookup(derivation(path, "user int, since timestamp, plan string", source))
    assert plans(lookup, edit(-7, 1_000), edit(7, 999), edit(8, 5_000)) == ["two", None, None]
    with pytest.raises(PlanError, match="int64 in the events and string"):
        TableLookup(derivation(path, SCHEMA, source))


def test_unreadable_and_future_events_are_dead(tmp_path):
    path = tmp_path / "accounts.parquet"
    write(path, [("ann", 1, "one")])
    values = [edit("ann", 5), b"[]", edit("ann", NOW_US), edit(3, 5), edit("bob", 6)]
    lookup = TableLookup(derivation(path))
    given_ = lookup.process(0, RecordBatch.of_values(values, 0), NOW_US)
    assert given_.keys == [b"ann", b"bob"]
    assert [(reject.kind, reject.offset) for _, reject in given_.rejects] == [("dead", 1), ("dead", 2), ("dead", 3)]
    assert lookup.clocks_us == (6_000,)
    assert lookup.process(0, RecordBatch.of_values([], 0), NOW_US).values == []


def test_a_changed_file_is_read_again_after_a_while(tmp_path):
    path = tmp_path / "accounts.parquet"
    write(path, [("ann", 1, "one")])
    lookup = TableLookup(derivation(path))
    assert plans(lookup, edit("ann", 5)) == ["one"]
    write(path, [("ann", 1, "one"), ("ann", 2, "two")])
    assert plans(lookup, edit("ann", 5), now_us=NOW_US + LOOK_US - 1) == ["one"]
    assert plans(lookup, edit("ann", 5), now_us=NOW_US + LOOK_US) == ["two"]


def test_a_missing_table_is_away_and_a_damaged_one_keeps_what_was_read(tmp_path, caplog):
    path = tmp_path / "accounts.parquet"
    lookup = TableLookup(derivation(path))
    with pytest.raises(OSError, match="Table 'accounts' cannot be read at"):
        plans(lookup, edit("ann", 5))
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(OSError, match="Table 'accounts' cannot be read at"):
        plans(lookup, edit("ann", 5))
    write(path, [("ann", 1, "one")])
    assert plans(lookup, edit("ann", 5)) == ["one"]
    path.write_bytes(b"PAR1 and no more")
    with caplog.at_level(logging.WARNING):
        assert plans(lookup, edit("ann", 5), now_us=NOW_US + LOOK_US) == ["one"]
    assert "the one read before stays" in caplog.text
    path.unlink()
    assert plans(lookup, edit("ann", 5), now_us=NOW_US + 2 * LOOK_US) == ["one"]


@pytest.mark.parametrize("place", ["table", "table/*.parquet", "table/part-*", "{}/table"])
def test_a_table_may_be_a_folder_or_a_glob_from_the_repository(tmp_path, place):
    folder = tmp_path / "table"
    folder.mkdir()
    write(folder / "part-2.parquet", [("ann", 1, "second")])
    write(folder / "part-1.parquet", [("ann", 1, "first"), ("bob", 1, "first")])
    lookup = TableLookup(derivation(place.format(tmp_path)), str(tmp_path))
    assert plans(lookup, edit("ann", 5), edit("bob", 5)) == ["second", "first"]
