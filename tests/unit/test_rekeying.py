"""Re-keyed events: values byte for byte, keys as `json.loads` reads them, and nothing without a reason left out."""

import json

from hypothesis import example, given, settings
from hypothesis import strategies as st

from streaming.deriving.derivation import Derivation, Input
from streaming.deriving.rekeying import Rekeying
from streaming.records import RecordBatch

EDITS = Input("edits", "edits", "", "time timestamp, page string", "time", 0)
DERIVATION = Derivation("by_page", "rekeyed", (EDITS,), "page", EDITS.schema, 0)
KEYS = st.one_of(
    st.text(max_size=12), st.integers(-(10**20), 10**20), st.booleans(), st.none(), st.floats(), st.just([])
)
FIELDS = st.lists(
    st.tuples(st.sampled_from(["page", "pag", "pages", "user"]), KEYS, st.sampled_from(["", " ", "\n"])), max_size=4
)


def written(fields: list, ascii_only: bool) -> bytes:
    """An object that may name a field several times."""
    parts = [
        f"{space}{json.dumps(name)}{space}:{json.dumps(value, ensure_ascii=ascii_only)}"
        for name, value, space in fields
    ]
    return ("{" + ",".join(parts) + "}").encode("utf-8", "surrogatepass")


def expected_key(value: bytes) -> bytes | None:
    try:
        fields = json.loads(value, parse_constant=lambda name: [][0])
        found = fields["page"]
        return str(found).encode() if isinstance(found, str | int) and not isinstance(found, bool) else None
    except (ValueError, KeyError, TypeError, IndexError):
        return None


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(FIELDS, st.booleans()), min_size=1, max_size=6), st.integers(0, 30), st.integers(0, 255))
@example([([("page", "\ud800", "")], True)], 0, 0)
@example([([("page", 0, "")], True)], 9, 45)
def test_keys_are_those_that_the_standard_library_reads(records, at, byte):
    values = [written(fields, ascii_only) for fields, ascii_only in records]
    mutated = bytearray(values[0])
    mutated[at % len(mutated)] = byte
    values.append(bytes(mutated))
    found = Rekeying(DERIVATION).process(0, RecordBatch.of_values(values, 100), 0)
    keys = [expected_key(value) for value in values]
    assert found.keys == [key for key in keys if key is not None]
    assert found.values == [value for value, key in zip(values, keys, strict=True) if key is not None]
    assert [(side, reject.kind, reject.offset, reject.value) for side, reject in found.rejects] == [
        (0, "dead", 100 + at, values[at]) for at, key in enumerate(keys) if key is None
    ]


def test_the_reason_says_what_is_wrong():
    values = [b'{"user": "a"}', b'{"page": null}', b'{"page": 1.5}', b'{"page": true}', b"[]", b"{", b'{"page": -0}']
    found = Rekeying(DERIVATION).process(0, RecordBatch.of_values(values, 0), 0)
    assert [reject.reason for _, reject in found.rejects][:5] == [
        "the key 'page' is missing",
        "the key 'page' is null",
        "the key 'page' is no string and no integer",
        "the key 'page' is no string and no integer",
        "the value is an array, not a JSON object",
    ]
    assert found.keys == [b"0"]


def test_a_null_value_is_refused():
    batch = RecordBatch.of_values([b'{"page": 7}', b""], 0)
    batch.values[1] = -1
    found = Rekeying(DERIVATION).process(0, batch, 0)
    assert (found.keys, found.values) == ([b"7"], [b'{"page": 7}'])
    assert found.rejects[0][1].reason == "the record has no value"
