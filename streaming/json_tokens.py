"""JSON grammar for the scanner: where a value ends, what a string or a number says, byte by byte in compiled code.

Positions are addresses (`i`, `end`), since passing an array from function to function costs more than reading it; the
caller keeps the bytes alive, and no byte at or after `end` is read. Every function refuses (-1) what `json.loads` would
refuse, and also what only it should judge: nesting below 64 levels and numbers longer than 300 bytes.

Grammar: RFC 8259. UTF-8: RFC 3629.
"""

import numpy as np

from streaming.compile_kernels import kernel
from streaming.decimals import MAX_DIGITS
from streaming.memory import byte, first_byte, word
from streaming.records import Bytes, Ints

NO_FIELD = -1
FAILED = -1
QUOTE, COMMA, COLON, MINUS, PLUS, DOT = 34, 44, 58, 45, 43, 46
OPEN_OBJECT, CLOSE_OBJECT = 123, 125

_BACKSLASH, _OPEN_ARRAY, _CLOSE_ARRAY = 92, 91, 93
_MAX_DEPTH = 64
_MAX_NUMBER_BYTES = 300
_ONES = np.uint64(0x0101010101010101)
_SPACES = np.uint64(0x2020202020202020)
_QUOTES = np.uint64(0x2222222222222222)
_BACKSLASHES = np.uint64(0x5C5C5C5C5C5C5C5C)
_HIGH_BITS = np.uint64(0x8080808080808080)
_ESCAPES = np.arange(256, dtype=np.uint8)
_ESCAPES[[98, 102, 110, 114, 116]] = [8, 12, 10, 13, 9]
_FIRST_KEY, _KEY, _FIRST_ITEM, _ITEM, _AFTER = range(5)


@kernel
def skip_value(i: int, end: int) -> int:
    """The index after the valid value at i < end, or -1 (also below 64 levels of nesting)."""
    c = byte(i)
    if c != OPEN_OBJECT and c != _OPEN_ARRAY:
        return _skip_scalar(i, end)
    depth, objects = 0, np.uint64(0)
    one = np.uint64(1)
    state = _ITEM
    while i < end:
        i = skip_space(i, end)
        if i >= end:
            return FAILED
        c = byte(i)
        closes = c == CLOSE_OBJECT if objects & one else c == _CLOSE_ARRAY
        if state != _KEY and state != _ITEM and closes:
            depth, objects = depth - 1, objects >> one
            i, state = i + 1, _AFTER
        elif state == _AFTER:
            if c != COMMA:
                return FAILED
            i, state = i + 1, _KEY if objects & one else _ITEM
        elif state == _FIRST_KEY or state == _KEY:
            if c != QUOTE:
                return FAILED
            close, _ = string_end(i + 1, end)
            if close < 0:
                return FAILED
            i = skip_space(close + 1, end)
            if i >= end or byte(i) != COLON:
                return FAILED
            i, state = i + 1, _ITEM
        elif c == OPEN_OBJECT or c == _OPEN_ARRAY:
            if depth == _MAX_DEPTH:
                return FAILED
            depth, objects = depth + 1, objects << one
            i, state = i + 1, _FIRST_ITEM
            if c == OPEN_OBJECT:
                objects, state = objects | one, _FIRST_KEY
        else:
            i, state = _skip_scalar(i, end), _AFTER
            if i < 0:
                return FAILED
        if depth == 0 and state == _AFTER:
            return i
    return FAILED


@kernel
def _skip_scalar(i: int, end: int) -> int:
    c = byte(i)
    if c == QUOTE:
        close, _ = string_end(i + 1, end)
        return close + 1 if close >= 0 else FAILED
    if c == MINUS or 48 <= c <= 57:
        return number(i, end)[0]
    return literal(i, end)


@kernel
def skip_space(i: int, end: int) -> int:
    """The index of the first byte from i that is no white space, or `end`."""
    while i < end:
        c = byte(i)
        if c > 32 or not (c == 32 or c == 10 or c == 13 or c == 9):
            break
        i += 1
    return i


@kernel
def string_end(i: int, end: int) -> tuple[int, bool]:
    """The index of the closing quote of a valid string whose first character is at i (or -1), and if it has escapes."""
    escaped = False
    while i < end:
        while i + 8 <= end:
            x = word(i)
            quotes, backslashes = x ^ _QUOTES, x ^ _BACKSLASHES
            special = x | (x - _SPACES) & ~x | (quotes - _ONES) & ~quotes | (backslashes - _ONES) & ~backslashes
            special &= _HIGH_BITS
            if special:
                i += first_byte(special)
                break
            i += 8
        if i >= end:
            break
        c = byte(i)
        if c == QUOTE:
            return i, escaped
        if c == _BACKSLASH:
            escaped = True
            if i + 1 >= end:
                return FAILED, escaped
            e = byte(i + 1)
            if e == 117:
                if i + 6 > end or _hex4(i + 2) < 0:
                    return FAILED, escaped
                i += 6
            elif e == QUOTE or e == _BACKSLASH or e == 47 or e == 98 or e == 102 or e == 110 or e == 114 or e == 116:
                i += 2
            else:
                return FAILED, escaped
        elif c < 32:
            return FAILED, escaped
        elif c < 128:
            i += 1
        else:
            length = _utf8_length(i, end)
            if length == 0:
                return FAILED, escaped
            i += length
    return FAILED, escaped


@kernel
def _utf8_length(i: int, end: int) -> int:
    """The length of the well-formed multi-byte character at i, or 0."""
    c = byte(i)
    low, high = 0x80, 0xBF
    if 0xC2 <= c <= 0xDF:
        length = 2
    elif 0xE0 <= c <= 0xEF:
        length = 3
        if c == 0xE0:
            low = 0xA0
        elif c == 0xED:
            high = 0x9F
    elif 0xF0 <= c <= 0xF4:
        length = 4
        if c == 0xF0:
            low = 0x90
        elif c == 0xF4:
            high = 0x8F
    else:
        return 0
    if i + length > end or not low <= byte(i + 1) <= high:
        return 0
    for k in range(2, length):
        if byte(i + k) & 0xC0 != 0x80:
            return 0
    return length


@kernel
def _hex4(i: int) -> int:
    code = 0
    for k in range(i, i + 4):
        c = byte(k)
        if 48 <= c <= 57:
            code = code * 16 + c - 48
        elif 65 <= c <= 70 or 97 <= c <= 102:
            code = code * 16 + (c & 0xDF) - 55
        else:
            return FAILED
    return code


@kernel
def unescape(i: int, end: int, text: Bytes, at: int) -> int:
    """Writes a valid string's characters to `text` from `at`; returns the end, or -1 at half a surrogate pair."""
    while i < end:
        c = byte(i)
        if c != _BACKSLASH:
            text[at] = c
            i, at = i + 1, at + 1
            continue
        e = byte(i + 1)
        if e != 117:
            text[at] = _ESCAPES[e]
            i, at = i + 2, at + 1
            continue
        code = _hex4(i + 2)
        i += 6
        if 0xD800 <= code <= 0xDFFF:
            if code > 0xDBFF or i + 6 > end or byte(i) != _BACKSLASH or byte(i + 1) != 117:
                return FAILED
            low = _hex4(i + 2)
            if not 0xDC00 <= low <= 0xDFFF:
                return FAILED
            code = 0x10000 + ((code - 0xD800) << 10) + low - 0xDC00
            i += 6
        at = _write_utf8(code, text, at)
    return at


@kernel
def _write_utf8(code: int, text: Bytes, at: int) -> int:
    if code < 0x80:
        text[at] = code
        return at + 1
    if code < 0x800:
        text[at] = 0xC0 | code >> 6
        text[at + 1] = 0x80 | code & 0x3F
        return at + 2
    if code < 0x10000:
        text[at] = 0xE0 | code >> 12
        text[at + 1] = 0x80 | code >> 6 & 0x3F
        text[at + 2] = 0x80 | code & 0x3F
        return at + 3
    text[at] = 0xF0 | code >> 18
    text[at + 1] = 0x80 | code >> 12 & 0x3F
    text[at + 2] = 0x80 | code >> 6 & 0x3F
    text[at + 3] = 0x80 | code & 0x3F
    return at + 4


@kernel
def literal(i: int, end: int) -> int:
    """The index after true, false or null at i, or -1."""
    c = byte(i)
    if c == 116:
        if i + 4 <= end and byte(i + 1) == 114 and byte(i + 2) == 117 and byte(i + 3) == 101:
            return i + 4
    elif c == 110:
        if i + 4 <= end and byte(i + 1) == 117 and byte(i + 2) == 108 and byte(i + 3) == 108:
            return i + 4
    elif c == 102 and i + 5 <= end and byte(i + 1) == 97 and byte(i + 2) == 108:
        if byte(i + 3) == 115 and byte(i + 4) == 101:
            return i + 5
    return FAILED


@kernel
def number(i: int, end: int) -> tuple[int, bool, bool, int, int, int]:
    """A number at i: the index after it (or -1), if it is an integer, negative; mantissa, its digits, exponent of ten.

    The mantissa is the first 19 significant digits as the bits of a uint64, so it is right as it stands up to 18;
    "1e5" is no integer, as for `json.loads`.
    """
    start = i
    negative = byte(i) == MINUS
    if negative:
        i += 1
    mantissa, digits, exponent = 0, 0, 0
    integer = True
    first = i
    while i < end and 48 <= byte(i) <= 57:
        if mantissa != 0 or byte(i) != 48:
            digits += 1
        if digits <= MAX_DIGITS:
            mantissa = mantissa * 10 + (byte(i) - 48)
        i += 1
    if i == first or (byte(first) == 48 and i > first + 1):
        return FAILED, integer, negative, mantissa, digits, exponent
    if i < end and byte(i) == DOT:
        integer = False
        i += 1
        first = i
        while i < end and 48 <= byte(i) <= 57:
            if mantissa != 0 or byte(i) != 48:
                digits += 1
            if digits <= MAX_DIGITS:
                mantissa = mantissa * 10 + (byte(i) - 48)
            i += 1
        exponent = first - i
        if i == first:
            return FAILED, integer, negative, mantissa, digits, exponent
    if i < end and (byte(i) == 101 or byte(i) == 69):
        integer = False
        i += 1
        below = False
        if i < end and (byte(i) == PLUS or byte(i) == MINUS):
            below = byte(i) == MINUS
            i += 1
        first = i
        power = 0
        while i < end and 48 <= byte(i) <= 57:
            power = min(power * 10 + (byte(i) - 48), 100_000)
            i += 1
        if i == first:
            return FAILED, integer, negative, mantissa, digits, exponent
        exponent += -power if below else power
    if i - start > _MAX_NUMBER_BYTES:
        i = FAILED
    return i, integer, negative, mantissa, digits, exponent


@kernel
def matching(start: int, length: int, names: Bytes, name_starts: Ints) -> int:
    """Which of the names, one after the other in `names`, stands in so many bytes at an address; NO_FIELD: none."""
    for field in range(len(name_starts) - 1):
        name = name_starts[field]
        if name_starts[field + 1] - name != length:
            continue
        k = 0
        while k < length and byte(start + k) == names[name + k]:
            k += 1
        if k == length:
            return field
    return NO_FIELD
