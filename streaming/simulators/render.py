"""JSON from columns: one object a row, written by a compiled kernel from a template of its fields.

A field is a column of int64: a number scaled by a power of ten, a time, the number of a name, or the index of a text
that was made once. So a row costs what copying its bytes costs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import orjson

from streaming.compile_kernels import kernel
from streaming.producing.columns import Events
from streaming.records import Bytes, Ints

NULL = -(2**63)
"""In a column: the JSON value null."""
_TEXT, _NUMBER, _NAME, _MOMENT = range(4)
_NUMBER_BYTES, _MOMENT_BYTES = 22, 26


@dataclass(frozen=True)
class Text:
    """One of these JSON values; the column holds its index."""

    values: Sequence[object]


@dataclass(frozen=True)
class Number:
    """A number with a fixed count of decimals; the column holds it times ten to the power of them."""

    decimals: int = 0


@dataclass(frozen=True)
class Name:
    """A string: the prefix, then the column's number with leading zeros up to `digits`."""

    prefix: str
    digits: int


@dataclass(frozen=True)
class Moment:
    """A time as ISO 8601 in UTC with milliseconds; the column holds microseconds since 1970."""


Field = Text | Number | Name | Moment
BOOLEAN = Text((False, True))


class Template:
    """How the events of one type are written.

    Args:
        fields: name to field, in the order of the object; a nested mapping is a nested object.
        key: the field whose text is the message key: a Name, or a Text of strings without anything to escape.
    """

    def __init__(self, fields: Mapping[str, "Field | Mapping[str, Field]"], key: str) -> None:
        self._names: list[str] = []
        self._fields: list[Field] = []
        literals = [b""]
        self._flatten(fields, "", literals)
        self._key = self._names.index(key)
        kinds = {Text: _TEXT, Number: _NUMBER, Name: _NAME, Moment: _MOMENT}
        self._kinds = np.array([kinds[type(field)] for field in self._fields], dtype=np.int64)
        self._literals, self._literal_starts = _packed(literals)
        pools = [_pool(field) for field in self._fields]
        self._pool, self._pool_starts = _packed([fragment for pool in pools for fragment in pool])
        self._pool_at = np.cumsum([0, *(len(pool) for pool in pools)])[:-1]
        self._digits = np.array(
            [getattr(field, "decimals", getattr(field, "digits", 0)) for field in self._fields], dtype=np.int64
        )
        longest = (max((len(fragment) for fragment in pool), default=0) for pool in pools)
        self._row_bytes = len(self._literals) + sum(longest) + (_NUMBER_BYTES + _MOMENT_BYTES) * len(self._fields)
        key_field = self._fields[self._key]
        if isinstance(key_field, Text) and any(b"\\" in fragment or fragment[0] != 34 for fragment in _pool(key_field)):
            raise ValueError(f"The texts of the key {key!r} must be strings that JSON does not escape.")

    def render(self, times_us: Ints, columns: Mapping[str, Ints], route: int = 0) -> Events:
        """Write N events; `columns` holds [N] arrays by field, `outer.inner` for a field of a nested object."""
        count = len(times_us)
        table = np.empty((count, len(self._names)), dtype=np.int64)
        for index, name in enumerate(self._names):
            table[:, index] = columns[name]
        buffer = np.empty(count * self._row_bytes, dtype=np.uint8)
        keys, values = np.empty((count, 2), dtype=np.int64), np.empty((count, 2), dtype=np.int64)
        used = _render(
            table,
            self._kinds,
            self._digits,
            self._literals,
            self._literal_starts,
            self._pool,
            self._pool_starts,
            self._pool_at,
            self._key,
            buffer,
            keys,
            values,
        )
        return Events(times_us, buffer[:used], keys, values, np.full(count, route, dtype=np.uint8))

    def _flatten(self, fields: "Mapping[str, Field | Mapping[str, Field]]", path: str, literals: list[bytes]) -> None:
        """Collect names and fields; `literals` gets the bytes before each field and, last, after all."""
        literals[-1] += b"{"
        for position, (name, field) in enumerate(fields.items()):
            literals[-1] += (b"," if position else b"") + orjson.dumps(name) + b":"
            if isinstance(field, Mapping):
                self._flatten(field, f"{path}{name}.", literals)
            else:
                self._names.append(path + name)
                self._fields.append(field)
                literals.append(b"")
        literals[-1] += b"}"


def _pool(field: Field) -> list[bytes]:
    match field:
        case Text(values):
            return [orjson.dumps(value) for value in values]
        case Name(prefix, _):
            return [orjson.dumps(prefix)[:-1]]
    return []


def _packed(parts: Sequence[bytes]) -> tuple[Bytes, Ints]:
    """All bytes in one buffer, and where each part starts, with the end of the last."""
    return np.frombuffer(b"".join(parts), dtype=np.uint8), np.cumsum([0, *map(len, parts)], dtype=np.int64)


@kernel
def _copy(source: Bytes, start: int, end: int, out: Bytes, at: int) -> int:
    first, to = np.uint64(start), np.uint64(at)  # unsigned: no check for an index from the end
    for index in range(np.uint64(end - start)):
        out[to + index] = source[first + index]
    return at + end - start


@kernel
def _write_digits(value: int, digits: int, out: Bytes, at: int) -> int:
    """A number of zero or more with at least so many digits."""
    ten, one = np.uint64(10), np.uint64(1)
    size, limit = 1, ten
    number = np.uint64(value)
    while size < 19 and number >= limit:
        size += 1
        limit *= ten
    size = max(size, digits)
    index = np.uint64(at + size)
    for _ in range(size):
        index -= one
        rest = number // ten
        out[index] = np.uint8(np.uint64(48) + number - rest * ten)
        number = rest
    return at + size


@kernel
def _write_number(value: int, decimals: int, out: Bytes, at: int) -> int:
    if value < 0:
        out[at] = 45
        at += 1
        value = -value
    if decimals == 0:
        return _write_digits(value, 1, out, at)
    scale = 1
    for _ in range(decimals):
        scale *= 10
    at = _write_digits(value // scale, 1, out, at)
    out[at] = 46
    return _write_digits(value % scale, decimals, out, at + 1)


@kernel
def _write_moment(time_us: int, out: Bytes, at: int) -> int:
    """The time in quotes; the calendar's arithmetic is Howard Hinnant's civil_from_days."""
    day = time_us // 86_400_000_000
    rest_ms = (time_us - day * 86_400_000_000) // 1000
    shifted = day + 719_468
    era = shifted // 146_097
    of_era = shifted - era * 146_097
    year_of_era = (of_era - of_era // 1460 + of_era // 36_524 - of_era // 146_096) // 365
    of_year = of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    shifted_month = (5 * of_year + 2) // 153
    month = shifted_month + 3 if shifted_month < 10 else shifted_month - 9
    out[at] = 34
    at = _write_digits(year_of_era + era * 400 + (1 if month <= 2 else 0), 4, out, at + 1)
    out[at] = 45
    at = _write_digits(month, 2, out, at + 1)
    out[at] = 45
    at = _write_digits(of_year - (153 * shifted_month + 2) // 5 + 1, 2, out, at + 1)
    out[at] = 84
    at = _write_digits(rest_ms // 3_600_000, 2, out, at + 1)
    out[at] = 58
    at = _write_digits(rest_ms // 60_000 % 60, 2, out, at + 1)
    out[at] = 58
    at = _write_digits(rest_ms // 1000 % 60, 2, out, at + 1)
    out[at] = 46
    at = _write_digits(rest_ms % 1000, 3, out, at + 1)
    out[at] = 90
    out[at + 1] = 34
    return at + 2


@kernel
def _render(
    table: Ints,
    kinds: Ints,
    digits: Ints,
    literals: Bytes,
    literal_starts: Ints,
    pool: Bytes,
    pool_starts: Ints,
    pool_at: Ints,
    key: int,
    out: Bytes,
    keys: Ints,
    values: Ints,
) -> int:
    """Write all rows one after the other; returns the bytes used."""
    at = 0
    fields = len(kinds)
    for row in range(len(table)):
        values[row, 0] = at
        for field in range(fields):
            at = _copy(literals, literal_starts[field], literal_starts[field + 1], out, at)
            start = at
            value = table[row, field]
            kind = kinds[field]
            if kind == _TEXT:
                index = pool_at[field] + value
                at = _copy(pool, pool_starts[index], pool_starts[index + 1], out, at)
            elif kind == _NAME:
                index = pool_at[field]
                at = _copy(pool, pool_starts[index], pool_starts[index + 1], out, at)
                at = _write_digits(value, digits[field], out, at)
                out[at] = 34
                at += 1
            elif value == NULL:
                out[at], out[at + 1], out[at + 2], out[at + 3] = 110, 117, 108, 108
                at += 4
            elif kind == _NUMBER:
                at = _write_number(value, digits[field], out, at)
            else:
                at = _write_moment(value, out, at)
            if field == key:
                keys[row, 0], keys[row, 1] = start + 1, at - 1
        at = _copy(literals, literal_starts[fields], literal_starts[fields + 1], out, at)
        values[row, 1] = at
    return at
