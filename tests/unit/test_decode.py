"""The scanner against `json.loads`: whatever the bytes, the same columns and the same refusals."""

import gzip
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import streaming.decode
from streaming.decode import Decoder, RecordError, read_record
from streaming.plan import Column, Plan
from streaming.records import RecordBatch

COLUMNS = (
    Column("amount", "double", nullable=True),
    Column("count", "bigint", nullable=True),
    Column("small", "tinyint", nullable=True),
    Column("flag", "boolean", nullable=True),
    Column("note", "string", nullable=True),
)


def plan(entity_type="string", columns=COLUMNS) -> Plan:
    return Plan("view", "topic", "", "user", entity_type, "time", columns, (), delay_us=0)


def batch(values: Sequence[bytes | None]) -> RecordBatch:
    """Records with plausible JSON before, between and after them, which must not be read."""
    parts, spans, at = [b'{"user":"'], [], 9
    for value in values:
        parts += [value or b"", b'"}, "time": 1, "user": "x"}']
        spans.append((at, at + len(value)) if value is not None else (-1, -1))
        at += len(parts[-2]) + len(parts[-1])
    count = len(values)
    nothing = np.full((count, 2), -1, dtype=np.int64)
    zeros = np.zeros(count, dtype=np.int64)
    return RecordBatch(
        3,
        np.frombuffer(b"".join(parts), dtype=np.uint8),
        np.arange(count),
        nothing,
        np.array(spans, dtype=np.int64).reshape(-1, 2),
        zeros,
    )


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


def check(values: Sequence[bytes | None], what: Plan) -> None:
    """Decodes the values together and compares each with the plain reader."""
    columns, rejects = Decoder(what).decode(batch(values))
    reasons = {reject.offset: reject.reason for reject in rejects}
    assert [reject.offset for reject in rejects] == sorted(reasons)
    for row, value in enumerate(values):
        try:
            record = read_record(what, value)
        except RecordError as error:
            assert not columns.readable[row]
            assert reasons[row] == str(error)
            continue
        assert columns.readable[row], value
        start, end = columns.entities[row]
        assert columns.text[start:end].tobytes() == record.entity
        assert columns.times[row] == record.time_us
        assert columns.present[row].tolist() == [x is not None for x in record.values]
        for got, expected in zip(columns.values[row], record.values, strict=True):
            assert bits(got) == bits(0.0 if expected is None else expected)


WELL_FORMED = (
    '{"user":"ann","time":"2015-09-12T00:47:35.776Z","amount":1.5,"count":3,"small":-7,"flag":true,"note":"n"}'
)
MOMENTS = st.sampled_from(
    [
        "2015-09-12T00:47:35.776Z",
        "2024-02-29T23:59:59+05:30",
        "2023-02-29T00:00:00Z",
        "1900-02-29T00:00:00Z",
        "2000-02-29T00:00:00-0130",
        "1969-12-31 23:59:59.999999",
        "0001-01-01T00:00:00+10:00",
        "0000-01-01T00:00:00Z",
        "2015-09-12T00:47",
        "2015-09-12T00:47+02",
        "2015-09-12T00:47:35.1234567Z",
        "2015-09-12T00:47:35.Z",
        "2015-09-12T00:47:35,5Z",
        "2015-09-12T00:47:35.5+23:60",
        "2015-09-12T24:00:00Z",
        "2015-09-12T00:47:60Z",
        "2015-09-12T00:47:35z",
        "2015-09-12T00:47:35Z ",
        "2015-09-12",
        "20150912T004735Z",
        "2015-W37-6",
        "yesterday",
        "",
    ]
)
TEXTS = st.text(max_size=12) | st.sampled_from(["é", "日本語", "😀", '"\\/\b\f\n\r\t', "\x00", "a" * 40, "\ud800"])
FLOATS = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.1, -0.0, 5e-324, 1.7976931348623157e308])
INTS = st.integers(-(1 << 66), 1 << 66) | st.integers(-130, 130) | st.sampled_from([2**63 - 1, -(2**63), 2**63])
SCALARS = st.none() | st.booleans() | INTS | FLOATS | TEXTS
NESTED = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
)
FIELDS = st.lists(
    st.one_of(
        st.tuples(st.just("user"), TEXTS | NESTED),
        st.tuples(st.just("time"), MOMENTS | st.integers(-(10**14), 10**15) | NESTED),
        st.tuples(st.sampled_from([column.name for column in COLUMNS]), SCALARS | NESTED),
        st.tuples(TEXTS, NESTED),
    ),
    max_size=8,
)


@st.composite
def objects(draw) -> bytes:
    """Objects with repeated, missing and mistyped fields, in several spellings."""
    fields = draw(FIELDS)
    if draw(st.integers(0, 3)):
        fields += [("user", draw(TEXTS)), ("time", draw(MOMENTS))]
    ascii_only, space = draw(st.booleans()), draw(st.sampled_from(["", " ", "\n\t\r"]))
    spelled = [
        f"{json.dumps(name, ensure_ascii=ascii_only)}{space}:{space}{json.dumps(value, ensure_ascii=ascii_only)}"
        for name, value in fields
    ]
    text = space + "{" + space + f"{space},{space}".join(spelled) + space + "}" + space
    return text.encode("utf-8", "surrogatepass")


@settings(max_examples=300, deadline=None)
@given(st.lists(objects() | st.none(), max_size=4))
def test_reads_objects_as_json_loads_does(values):
    check(values, plan())


@settings(max_examples=300, deadline=None)
@given(objects(), st.data())
@example(b'{"user":"a","time":1}', None)
def test_reads_damaged_objects_as_json_loads_does(value, data):
    if data is not None:
        for _ in range(data.draw(st.integers(1, 2))):
            at = data.draw(st.integers(0, len(value)))
            cut = data.draw(st.integers(0, 2))
            insert = data.draw(
                st.binary(max_size=2) | st.sampled_from([b'"', b"\\", b"}", b"]", b",", b"0", b"-", b"e"])
            )
            value = value[:at] + insert + value[at + cut :]
    check([value, value[: len(value) // 2]], plan())


@pytest.mark.parametrize(
    "number",
    "0 -0 -0.0 0.0 00 01 -01 1. .5 - -. 1e5 1E+5 1e-5 1e 1e+ 0e0 0.1 0.30000000000000004 123456789012345678 "
    "9223372036854775807 -9223372036854775808 9223372036854775808 99999999999999999999 1e22 1e23 9007199254740993 "
    "9007199254740993.0 1e308 1e309 -1e400 1e-400 4.9e-324 0.00000000000000000000000012345 1e99999999999 127 128 -129 "
    "5.0 NaN Infinity -Infinity nan true false null tru nul True +1 0x10 1_000 ١".split(),
)
@pytest.mark.parametrize("field", ["amount", "count", "small", "flag", "ignored", "time"])
def test_reads_numbers_as_json_loads_does(number, field):
    check([f'{{"user":"a","time":5,"{field}":{number}}}'.encode()], plan())


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b" ",
        b"{}",
        b"[]",
        b"null",
        b"3",
        b'"text"',
        b'{"user":"a","time":1}',
        b'{"user":"a","time":1,}',
        b'{,"user":"a","time":1}',
        b'{"user":"a","time":1}}',
        b'{"user":"a","time":1} x',
        b'{"user":"a","time":1}\xff',
        b'\xef\xbb\xbf{"user":"a","time":1}',
        b'{"user":"a" "time":1}',
        b'{"user":"\xc3\x28","time":1}',
        b'{"user":"\xed\xa0\x80","time":1}',
        b'{"user":"\xf4\x90\x80\x80","time":1}',
        b'{"user":"\xc0\x80","time":1}',
        b'{"user":"a\nb","time":1}',
        b'{"user":"a\\x","time":1}',
        b'{"user":"\\ud83d\\ude00","time":1}',
        b'{"user":"\\ud83d","time":1}',
        b'{"user":"\\ude00\\ud83d","time":1}',
        b'{"user":"\\u00g0","time":1}',
        b'{"\\u0075ser":"a","t\\u0069me":1}',
        b'{"user":"a","time":1,"note":"\\ud83d"}',
        b'{"user":"a","user":"b","time":1,"time":2}',
        b'{"user":"a","user":null,"time":1}',
        b'{"user":1,"user":"b","time":1}',
        b'{"user":"b\\n","user":"c","time":1}',
        b'{"user":"a","time":1,"amount":1,"amount":null}',
        b'{"user":"a","time":true}',
        b'{"user":"a","time":1.0}',
        b'{"user":"a","time":253402300800000}',
        b'{"user":"a","time":1,"x":' + b"[" * 63 + b"]" * 63 + b"}",
        b'{"user":"a","time":1,"x":' + b"[" * 65 + b"]" * 65 + b"}",
        b'{"user":"a","time":1,"x":' + b'{"a":[' * 32 + b"]}" * 32 + b"}",
        b'{"user":"a","time":1,"x":' + b"[{" * 32 + b"]}" * 32 + b"}",
        b'{"user":"a","time":1,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"user":"a","time":1,"x":' + b"9" * 5000 + b"}",
        b'{"user":"a","time":1,"x":[1,]}',
        b'{"user":"a","time":1,"x":{"a":1,}}',
        b'{"user":"a","time":1,"x":{"a"}}',
        b'{"user":"a","time":1,"x":[1}}',
        b'{"user":"a","time":1,"":{}}',
    ],
)
def test_reads_odd_records_as_json_loads_does(value):
    check([value, *(value[:end] for end in range(0, min(len(value), 60)))], plan())


@pytest.mark.parametrize(
    "value", [b"7", b"-7", b"0", b'"7"', b"7.0", b"9223372036854775807", b"9223372036854775808", b"true", b"null"]
)
def test_reads_integer_entities(value):
    check([b'{"time":1,"user":' + value + b"}"], plan(entity_type="int64"))


def test_counts_of_the_keys_and_required_columns():
    columns = (Column("user", "string", nullable=False), Column("amount", "double", nullable=False))
    values = [b'{"user":"a","time":1,"amount":2}', b'{"user":"a","time":1}', b'{"user":"a","time":1,"amount":null}']
    check(values, plan(columns=columns))
    decoded, rejects = Decoder(plan(columns=columns)).decode(batch(values))
    assert decoded.present[0].tolist() == [True, True]
    assert [reject.reason for reject in rejects] == ["field 'amount' is missing", "field 'amount' is null"]


def test_reasons_say_what_is_wrong():
    values = [
        None,
        b"{",
        b"\xff",
        b"[1]",
        b'{"time":1}',
        b'{"user":3,"time":1}',
        b'{"user":"a","time":"soon"}',
        b'{"user":"a","time":1,"count":1.5}',
        b'{"user":"a","time":1,"small":300}',
    ]
    _, rejects = Decoder(plan()).decode(batch(values))
    assert [reject.reason for reject in rejects] == [
        "the record has no value",
        "the value is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "the value is not UTF-8 at byte 0",
        "the value is an array, not a JSON object",
        "field 'user' is missing",
        "field 'user' holds an integer where string is declared",
        "field 'time' is not an ISO 8601 time: 'soon'",
        "field 'count' holds a number with a fraction where bigint is declared",
        "field 'small' is out of the range of tinyint",
    ]
    assert {(reject.kind, reject.partition) for reject in rejects} == {("dead", 3)}
    assert rejects[5].value == values[5]


def test_ordinary_records_need_no_plain_reader(monkeypatch):
    def refuse(*_):
        raise AssertionError("referred to the plain reader")

    monkeypatch.setattr(streaming.decode, "read_record", refuse)
    values = [
        WELL_FORMED,
        '{"user":"\\u00e9\\n","time":1442018855776,"other":{"a":[1,2.5e3,{"b":null}],"c":"\\ud800"},"amount":-12.25}',
        '{"time":"2015-09-12T00:47:35+02:00","user":"日本","amount":0.1,"count":-999999999999999999,"note":null}',
    ]
    columns, rejects = Decoder(plan()).decode(batch([value.encode() for value in values]))
    assert columns.readable.all() and not rejects


@pytest.mark.skipif("MILLRACE_DATA" not in os.environ, reason="needs the real edits of MILLRACE_DATA")
def test_reads_every_real_edit_as_json_loads_does():
    columns = tuple(Column(name, "bigint", nullable=True) for name in ("added", "deleted", "delta"))
    columns += (Column("isRobot", "boolean", nullable=False), Column("country", "string", nullable=True))
    (path,) = Path(os.environ["MILLRACE_DATA"], "events-wikipedia-edits").glob("*.jsonl.gz")
    with gzip.open(path) as lines:
        values = [line.rstrip(b"\n") for line in lines]
    assert len(values) > 30_000
    check(values, plan(columns=columns))
