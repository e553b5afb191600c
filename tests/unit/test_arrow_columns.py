"""Arrow tables against the plain JSON reader: the same fields mean the same columns, or the same refusal."""

import json
from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.arrow_columns import TableError, check_schema, columns
from streaming.decode import RecordError, read_record
from streaming.plan import Aggregate, Column, Plan

COLUMNS = (
    Column("x", "double", nullable=True),
    Column("n", "smallint", nullable=True),
    Column("flag", "boolean", nullable=True),
    Column("word", "string", nullable=True),
    Column("must", "bigint", nullable=False),
)
TIMES = st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29)).map(lambda at: at.replace(tzinfo=UTC))  # noqa: DTZ001


def plan(entity_type: str = "string", columns: tuple[Column, ...] = COLUMNS) -> Plan:
    aggregates = (Aggregate("c", columns[0].name, "count", 1_000_000, 1_000_000),)
    return Plan("view", "topic", "", "user", entity_type, "time", columns, aggregates, 0)  # type: ignore[arg-type]


def read(what: Plan, table: pa.Table) -> tuple[list, dict[int, str]]:
    check_schema(what, table.schema, "the table")
    batch = table.combine_chunks().to_batches()[0]
    got, rejects = columns(what, batch, 3, np.arange(100, 100 + batch.num_rows))
    rows: list = []
    for row, readable in enumerate(got.readable):
        start, end = got.entities[row]
        cells = [v if p else None for v, p in zip(got.values[row], got.present[row], strict=True)]
        rows.append((got.text[start:end].tobytes(), int(got.times[row]), tuple(cells)) if readable else None)
    assert [(reject.kind, reject.partition) for reject in rejects] == [("dead", 3)] * len(rejects)
    return rows, {reject.offset - 100: reject.reason for reject in rejects}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "user": st.none() | st.text(max_size=5),
                "time": st.none() | TIMES,
                "x": st.none() | st.floats(allow_nan=False),
                "n": st.none() | st.integers(-40_000, 40_000),
                "flag": st.none() | st.booleans(),
                "word": st.none() | st.text(max_size=3),
                "must": st.none() | st.integers(-(1 << 63), (1 << 63) - 1),
            }
        ),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
)
def test_a_table_means_what_the_same_json_means(events, sliced):
    schema = pa.schema(
        {
            "user": pa.string(),
            "time": pa.timestamp("us", "Europe/Berlin"),
            "x": pa.float64(),
            "n": pa.int32(),
            "flag": pa.bool_(),
            "word": pa.large_string(),
            "must": pa.int64(),
        }
    )
    table = pa.Table.from_pylist(events, schema)
    if sliced:
        table = pa.concat_tables([table.slice(0, 1), table]).combine_chunks().slice(1)
    rows, refused = read(plan(), table)
    for row, event in enumerate(events):
        text = json.dumps(event | {"time": event["time"] and event["time"].isoformat()})
        try:
            expected = read_record(plan(), text.replace("Infinity", "1e999").encode())
        except RecordError:
            assert rows[row] is None and row in refused
        else:
            assert rows[row] == tuple(expected)
    assert set(refused) == {row for row, found in enumerate(rows) if found is None}


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([1_700_000_000], pa.timestamp("s")), 1_700_000_000_000_000),
        (pa.array([-1], pa.timestamp("ms")), -1_000),
        (pa.array([-1], pa.timestamp("ns", "UTC")), -1),
        (pa.array([1_500], pa.timestamp("ns")), 1),
        (pa.array([1_700_000_000_123]), 1_700_000_000_123_000),
        (pa.array(["2024-05-01T00:00:00.5+02:00"]), 1_714_514_400_500_000),
        (pa.array([date(1970, 1, 2)]), 86_400_000_000),
        (pa.array(["1970-01-01T00:00:01Z"]).dictionary_encode(), 1_000_000),
    ],
)
def test_every_way_to_write_a_time(array, expected):
    table = pa.table({"user": pa.array(["a"]).dictionary_encode(), "time": array, "x": [1.0], "must": [1]})
    assert read(plan(), table) == ([(b"a", expected, (1.0, None, None, None, 1.0))], {})


def test_refusals_name_the_field_and_the_first_reason():
    table = pa.table(
        {
            "user": pa.array([1, None, 1 << 63, 4, 5, 6, 7], pa.uint64()),
            "time": pa.array([1, 1, 1, 1 << 62, 5, None, 7], pa.int64()),
            "x": pa.array([1.0, 2.0, 3.0, 4.0, float("inf"), 6.0, float("nan")], pa.float32()),
            "n": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.5],
            "must": [1.0, None, 3.0, 4.0, 5.0, 6.0, 7.0],
        }
    )
    rows, refused = read(plan("int64"), table)
    assert rows[0] == ((1).to_bytes(8, "little"), 1_000, (1.0, 1.0, None, None, 1.0))
    assert refused == {
        1: "field 'user' is null",
        2: "field 'user' is out of the range of bigint",
        3: "field 'time' is out of the years 1 to 9999",
        4: "field 'x' is out of the range of double",
        5: "field 'time' is null",
        6: "field 'n' holds a number with a fraction where smallint is declared",
    }


def test_nan_is_a_missing_value():
    table = pa.table({"user": ["a"], "time": [0], "x": [float("nan")], "must": [1]})
    assert read(plan(), table)[0] == [(b"a", 0, (None, None, None, None, 1.0))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": None}, "the table has no column 'user', which view 'view' reads: it has time, must."),
        ({"user": pa.array([1])}, "Column 'user' of the table is int64: it must be string."),
        ({"time": pa.array([True])}, "it must be a timestamp, ISO 8601 text or epoch milliseconds"),
        ({"must": None}, "has no column 'must', which is declared not null"),
        ({"x": pa.array(["a"])}, "Column 'x' of the table is string: view 'view' reads double."),
        ({"flag": pa.array([1])}, "Column 'flag' of the table is int64: view 'view' reads boolean."),
    ],
)
def test_a_table_of_another_kind_is_refused_in_a_sentence(change, message):
    fields = {"user": pa.array(["a"]), "time": pa.array([0]), "must": pa.array([1])} | change
    table = pa.table({name: array for name, array in fields.items() if array is not None})
    with pytest.raises(TableError) as error:
        check_schema(plan(), table.schema, "the table")
    assert message in str(error.value)


def test_times_far_beyond_what_microseconds_hold_do_not_wrap_around():
    table = pa.table({"user": ["a"], "time": pa.array([(1 << 63) - 1], pa.timestamp("s")), "must": [1]})
    assert read(plan(), table)[1] == {0: "field 'time' is out of the years 1 to 9999"}
