"""What the template writes is the JSON that orjson would read back to the same values."""

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.producing.columns import CHUNK, from_rows, joined, limited, rows
from streaming.simulators.render import BOOLEAN, NULL, Moment, Name, Number, Template, Text

TEXTS = ('with "quotes"', "ünïcode", "", "line\nbreak", None)
integers = st.integers(-(2**63) + 1, 2**63 - 1)
instants = st.integers(-62_135_596_800_000, 253_402_300_799_000)  # the years 1 to 9999, in milliseconds
template = Template(
    {
        "id": Name("no-", 3),
        "n": Number(),
        "x": Number(decimals=3),
        "at": Moment(),
        "text": Text(TEXTS),
        "ok": BOOLEAN,
        "inner": {"a b": Number(), "c": Moment()},
    },
    key="id",
)
row = st.tuples(st.integers(0, 10**6), integers, integers, instants, st.integers(0, 4), st.booleans(), integers)


@settings(deadline=None)  # the first example compiles
@given(st.lists(row, max_size=20))
def test_values_come_back(found) -> None:
    ids, n, x, at_ms, text, ok, inner = (
        (np.array(column, dtype=np.int64) for column in zip(*found, strict=True))
        if found
        else [np.empty(0, dtype=np.int64)] * 7
    )
    at_us = at_ms * 1000
    names = {"id": ids, "n": n, "x": x, "at": at_us, "text": text, "ok": ok, "inner.a b": inner, "inner.c": at_us}
    events = template.render(at_us, names)
    assert len(events) == len(found)
    for index, (number, whole, scaled, ms, choice, flag, within) in enumerate(found):
        value = events.value(index)
        fields = json.loads(value, parse_float=str, parse_int=str)
        assert orjson.loads(value)["text"] == TEXTS[choice]
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)
        assert datetime.fromisoformat(fields["at"]) == datetime.fromisoformat(fields["inner"]["c"]) == moment
        assert fields["id"] == f"no-{number:03}" == events.key(index).decode()
        assert (fields["n"], fields["inner"]["a b"], fields["ok"]) == (str(whole), str(within), flag)
        assert int(fields["x"].replace(".", "")) == scaled
        assert fields["x"][-4] == "."
        assert list(fields) == ["id", "n", "x", "at", "text", "ok", "inner"]


def test_null_is_a_number_and_a_moment_that_is_not_there() -> None:
    small = Template({"k": Name("k", 1), "n": Number(2), "t": Moment()}, key="k")
    nothing = np.full(1, NULL)
    events = small.render(np.zeros(1, np.int64), {"k": np.zeros(1, np.int64), "n": nothing, "t": nothing})
    assert events.value(0) == b'{"k":"k0","n":null,"t":null}'


@pytest.mark.parametrize("texts", [['a"b'], ["a\nb"], [None], [1]])
def test_a_key_that_json_would_escape_is_refused(texts: list[object]) -> None:
    with pytest.raises(ValueError, match="key 'k'"):
        Template({"k": Text(texts)}, key="k")


@given(st.lists(st.tuples(st.binary(max_size=9), st.binary(max_size=30))), st.lists(st.integers(0, 99), max_size=30))
@settings(deadline=None)  # the first example compiles
def test_columns_taken_joined_and_compacted_are_the_same_events(pairs, places) -> None:
    events = from_rows(list(range(len(pairs))), [key for key, _ in pairs], [value for _, value in pairs])
    listed = list(rows([events]))
    assert [(event.key, event.value) for event in listed] == pairs
    chosen = [place % len(pairs) for place in places] if pairs else []
    taken = events.take(np.array(chosen, dtype=np.int64))
    assert list(rows([taken])) == list(rows([taken.compact()])) == [listed[place] for place in chosen]
    assert list(rows([joined([events, taken.compact(), events])])) == listed + list(rows([taken])) + listed
    for limit in (0, 1, len(pairs), len(pairs) + 5):
        assert list(rows(limited([events, events], limit or 1))) == (listed + listed)[: limit or 1]


def test_a_key_within_its_value_stays_within_it() -> None:
    small = Template({"user": Name("u", 7)}, key="user")
    count = CHUNK // 64
    events = small.render(np.arange(count), {"user": np.arange(count)})
    few = events.take(np.arange(0, count, 2)).compact()
    assert len(few.buffer) == sum(len(event.value) for event in rows([few]))
    assert [event.key for event in rows([few])] == [f"u{n:07}".encode() for n in range(0, count, 2)]
