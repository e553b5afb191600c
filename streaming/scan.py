"""The JSON scanner: one pass over the bytes of each value, reading only the fields that a plan needs.

It accepts a record only where it is certain to read what `json.loads` would; everything else (wrong types, broken JSON,
numbers out of range or too close to half-way between two doubles) it refers to the plain reader in `decode`, which
either reads the record or says what is wrong with it. So it is fast on good records and never clever on bad ones.

Fast exact floats: Clinger, "How to read floating point numbers accurately" (1990); the others in `decimals`.
"""

import numpy as np

from streaming.compile_kernels import kernel
from streaming.decimals import nearest
from streaming.json_tokens import (
    CLOSE_OBJECT,
    COLON,
    COMMA,
    DOT,
    FAILED,
    MINUS,
    NO_FIELD,
    OPEN_OBJECT,
    PLUS,
    QUOTE,
    literal,
    matching,
    number,
    skip_space,
    skip_value,
    string_end,
    unescape,
)
from streaming.memory import address, byte
from streaming.records import Bools, Bytes, Floats, Ints

INTEGER, REAL, BOOLEAN, STRING, TIME = range(5)
MIN_EPOCH_MS, MAX_EPOCH_MS = -62_135_596_800_000, 253_402_300_799_999

_NO_TIME_US = -(1 << 62)
_EXACT_MANTISSA = 1 << 53
_POWERS_OF_TEN = np.array([10.0**exponent for exponent in range(23)])


@kernel
def scan_values(
    buffer: Bytes,
    spans: Ints,
    names: Bytes,
    name_starts: Ints,
    kinds: Ints,
    limits: Ints,
    slots: Ints,
    times: Ints,
    text: Bytes,
    entities: Ints,
    texts: Ints,
    values: Floats,
    present: Bools,
    referred: Bools,
) -> int:
    """Reads N values; field 0 is the entity, field 1 the time, field 2 + c the aggregated column c.

    Args:
        buffer: Holds the values.
        spans: [N, 2] start and end of each value; start -1 is a null value (referred).
        names: UTF-8 names of the F fields, one after another.
        name_starts: [F + 1] where each name starts in `names`.
        kinds: [F] INTEGER, REAL, BOOLEAN, STRING or TIME.
        limits: [F, 2] smallest and largest INTEGER.
        slots: [F] which of `texts` takes a STRING, -1 where only its presence counts.
        times: [N] out, microseconds since 1970 UTC.
        text: Out, the bytes of entities and texts; as long as all values and 8 bytes a record together.
        entities: [N, 2] out, spans into `text`; an INTEGER entity is 8 bytes, little end first.
        texts: [N, T, 2] out, spans into `text`, empty where not present.
        values: [N, C] out, 0.0 where not present.
        present: [N, C] out.
        referred: [N] out, true where the plain reader must look.

    Returns:
        How many bytes of `text` are used.
    """
    seen = np.zeros(len(kinds), dtype=np.bool_)
    used = 0
    base = address(buffer)
    for row in range(len(spans)):
        end = FAILED
        if spans[row, 0] >= 0:
            seen[:] = False
            end = _scan_record(
                base + spans[row, 0],
                base + spans[row, 1],
                names,
                name_starts,
                kinds,
                limits,
                slots,
                seen,
                row,
                times,
                text,
                used,
                entities,
                texts,
                values,
            )
        referred[row] = end < 0 or not (seen[0] and seen[1])
        if referred[row]:
            continue
        used = end
        for column in range(len(kinds) - 2):
            present[row, column] = seen[column + 2]
            if not seen[column + 2]:
                values[row, column] = 0.0
                if slots[column + 2] >= 0:
                    texts[row, slots[column + 2], 0] = texts[row, slots[column + 2], 1] = 0
    return used


@kernel
def _scan_record(
    i: int,
    end: int,
    names: Bytes,
    name_starts: Ints,
    kinds: Ints,
    limits: Ints,
    slots: Ints,
    seen: Bools,
    row: int,
    times: Ints,
    text: Bytes,
    used: int,
    entities: Ints,
    texts: Ints,
    values: Floats,
) -> int:
    """Reads one object into a row, whose text goes to `text` from `used`; returns the end of that, or -1 (referred)."""
    integer_at = used
    if kinds[0] != STRING:
        used += 8
    i = skip_space(i, end)
    if i >= end or byte(i) != OPEN_OBJECT:
        return FAILED
    while True:
        i = skip_space(i + 1, end)
        if i >= end or byte(i) != QUOTE:
            return FAILED
        close, escaped = string_end(i + 1, end)
        if close < 0:
            return FAILED
        if escaped:
            name_end = unescape(i + 1, close, text, used)
            if name_end < 0:
                return FAILED
            field = matching(address(text) + used, name_end - used, names, name_starts)
        else:
            field = matching(i + 1, close - i - 1, names, name_starts)
        i = skip_space(close + 1, end)
        if i >= end or byte(i) != COLON:
            return FAILED
        i = skip_space(i + 1, end)
        if i >= end:
            return FAILED
        if field == NO_FIELD:
            i = skip_value(i, end)
        elif byte(i) == 110:
            seen[field] = False
            i = literal(i, end)
        else:
            seen[field] = True
            kind = kinds[field]
            if kind == STRING and field == 0:
                entities[row, 0] = used
                i, used = _read_text(i, end, text, used)
                entities[row, 1] = used
            elif kind == STRING and slots[field] >= 0:
                texts[row, slots[field], 0] = used
                i, used = _read_text(i, end, text, used)
                texts[row, slots[field], 1] = used
            elif field == 0:
                entities[row, 0], entities[row, 1] = integer_at, integer_at + 8
                i = _read_integer_entity(i, end, text, integer_at)
            elif kind == TIME:
                i, times[row] = _read_time(i, end)
            elif kind == STRING:
                i = skip_value(i, end) if byte(i) == QUOTE else FAILED
            else:
                i, values[row, field - 2] = _read_number(i, end, kind, limits[field, 0], limits[field, 1])
        if i < 0:
            return FAILED
        i = skip_space(i, end)
        if i < end and byte(i) == CLOSE_OBJECT and skip_space(i + 1, end) == end:
            return used
        if i >= end or byte(i) != COMMA:
            return FAILED


@kernel
def _read_number(i: int, end: int, kind: int, lowest: int, highest: int) -> tuple[int, float]:
    """A value of an INTEGER, REAL or BOOLEAN column at i: the index after it (-1: referred), and it."""
    c = byte(i)
    if kind == BOOLEAN:
        return literal(i, end), 1.0 if c == 116 else 0.0
    if c != MINUS and not 48 <= c <= 57:
        return FAILED, 0.0
    i, integer, negative, mantissa, digits, exponent = number(i, end)
    if i < 0:
        return FAILED, 0.0
    if integer and digits <= 18:
        value = -mantissa if negative else mantissa
        if kind == INTEGER and not lowest <= value <= highest:
            return FAILED, 0.0
        return i, float(value)
    if kind == INTEGER:
        return FAILED, 0.0
    if 0 <= mantissa <= _EXACT_MANTISSA and -22 <= exponent <= 22:
        real = float(mantissa)
        real = real / _POWERS_OF_TEN[-exponent] if exponent < 0 else real * _POWERS_OF_TEN[exponent]
    else:
        real = nearest(mantissa, digits, exponent) if mantissa != 0 else 0.0
        if not np.isfinite(real):
            return FAILED, 0.0
    return i, -real if negative else real


@kernel
def _read_text(i: int, end: int, text: Bytes, at: int) -> tuple[int, int]:
    """Writes the string at i to `text` from `at`: the index after it (-1: referred), and the end of its bytes."""
    if byte(i) != QUOTE:
        return FAILED, at
    close, escaped = string_end(i + 1, end)
    if close < 0:
        return FAILED, at
    if escaped:
        text_end = unescape(i + 1, close, text, at)
        return (close + 1 if text_end >= 0 else FAILED), text_end
    for k in range(i + 1, close):
        text[at] = byte(k)
        at += 1
    return close + 1, at


@kernel
def _read_integer_entity(i: int, end: int, text: Bytes, at: int) -> int:
    """Writes the integer at i to 8 bytes of `text` from `at`: the index after it (-1: referred)."""
    if byte(i) != MINUS and not 48 <= byte(i) <= 57:
        return FAILED
    i, integer, negative, mantissa, digits, _ = number(i, end)
    if i < 0 or not integer or digits > 18:
        return FAILED
    value = -mantissa if negative else mantissa
    for k in range(8):
        text[at + k] = value >> 8 * k & 0xFF
    return i


@kernel
def _digits(i: int, count: int) -> int:
    total = 0
    for k in range(i, i + count):
        c = byte(k)
        if not 48 <= c <= 57:
            return FAILED
        total = total * 10 + c - 48
    return total


@kernel
def _read_time(i: int, end: int) -> tuple[int, int]:
    """An ISO 8601 string or integer epoch milliseconds at i: the index after it (-1: referred), microseconds."""
    c = byte(i)
    if c == QUOTE:
        close, escaped = string_end(i + 1, end)
        if close < 0 or escaped:
            return FAILED, 0
        time_us = _iso_8601(i + 1, close)
        return (FAILED, 0) if time_us == _NO_TIME_US else (close + 1, time_us)
    if c != MINUS and not 48 <= c <= 57:
        return FAILED, 0
    i, integer, negative, mantissa, digits, _ = number(i, end)
    milliseconds = -mantissa if negative else mantissa
    if i < 0 or not integer or digits > 18 or not MIN_EPOCH_MS <= milliseconds <= MAX_EPOCH_MS:
        return FAILED, 0
    return i, milliseconds * 1000


@kernel
def _iso_8601(i: int, end: int) -> int:
    """YYYY-MM-DDTHH:MM[:SS[.fraction]][Z|+HH[[:]MM]] as microseconds (UTC where no offset), or _NO_TIME_US.

    Digits after the sixth of a fraction are cut off, as `datetime.fromisoformat` does.
    """
    if end - i < 16 or byte(i + 4) != MINUS or byte(i + 7) != MINUS or byte(i + 13) != COLON:
        return _NO_TIME_US
    if byte(i + 10) != 84 and byte(i + 10) != 32:
        return _NO_TIME_US
    year, month, day = _digits(i, 4), _digits(i + 5, 2), _digits(i + 8, 2)
    hour, minute, second, fraction = _digits(i + 11, 2), _digits(i + 14, 2), 0, 0
    if year < 1 or not 1 <= month <= 12 or day < 1 or not 0 <= hour <= 23 or not 0 <= minute <= 59:
        return _NO_TIME_US
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    if day > (28 + leap if month == 2 else 30 if month == 4 or month == 6 or month == 9 or month == 11 else 31):
        return _NO_TIME_US
    i += 16
    if i + 3 <= end and byte(i) == COLON:
        second = _digits(i + 1, 2)
        if not 0 <= second <= 59:
            return _NO_TIME_US
        i += 3
        if i < end and byte(i) == DOT:
            i += 1
            first, scale = i, 100_000
            while i < end and 48 <= byte(i) <= 57:
                fraction += (byte(i) - 48) * scale
                scale //= 10
                i += 1
            if i == first:
                return _NO_TIME_US
    offset = _offset_minutes(i, end)
    if offset == _NO_TIME_US:
        return _NO_TIME_US
    shifted = year - (month <= 2)
    era = shifted // 400
    of_era = shifted - era * 400
    of_year = (153 * (month - 3 if month > 2 else month + 9) + 2) // 5 + day - 1
    days = era * 146_097 + of_era * 365 + of_era // 4 - of_era // 100 + of_year - 719_468
    return (((days * 24 + hour) * 60 + minute - offset) * 60 + second) * 1_000_000 + fraction


@kernel
def _offset_minutes(i: int, end: int) -> int:
    """Minutes east of UTC of the rest of an ISO 8601 time, or _NO_TIME_US."""
    length = end - i
    if length == 0 or (length == 1 and byte(i) == 90):
        return 0
    if (byte(i) != PLUS and byte(i) != MINUS) or (length != 3 and length != 5 and length != 6):
        return _NO_TIME_US
    hours, minutes = _digits(i + 1, 2), 0
    if length == 6 and byte(i + 3) != COLON:
        return _NO_TIME_US
    if length > 3:
        minutes = _digits(end - 2, 2)
    if not 0 <= hours <= 23 or not 0 <= minutes <= 59:
        return _NO_TIME_US
    total = hours * 60 + minutes
    return -total if byte(i) == MINUS else total
