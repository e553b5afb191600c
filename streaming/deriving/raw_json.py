"""Values of JSON objects as the bytes that they are written with, and objects made longer without reading them again.

A joined event is the left object up to its last brace, followed by the fields of the right one: so numbers keep their
digits and texts their escapes. The values must have been accepted by `decode`: nothing is checked here.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt

from streaming.compile_kernels import kernel
from streaming.json_tokens import (
    CLOSE_OBJECT,
    COLON,
    COMMA,
    FAILED,
    NO_FIELD,
    OPEN_OBJECT,
    QUOTE,
    matching,
    skip_space,
    skip_value,
    string_end,
    unescape,
)
from streaming.memory import address, byte, copy
from streaming.records import Bools, Bytes, Ints, RecordBatch

T = TypeVar("T", bound=np.generic)

NO_SPAN = -1

_NULL = b"null"


def read_only(array: npt.NDArray[T]) -> npt.NDArray[T]:
    """A view of one type, so that kernels are compiled once wherever the array comes from."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


NO_TEXT = read_only(np.zeros(0, dtype=np.uint8))


def joined(left: Bytes, left_spans: Ints, right: Bytes, right_spans: Ints, nothing: Bytes) -> list[bytes]:
    """Each left span [N, 2] and after it its right one, or `nothing` where that starts at `NO_SPAN`."""
    text, ends = _join(read_only(left), left_spans, read_only(right), right_spans, nothing)
    data = text.tobytes()
    return [data[start:end] for start, end in pairwise(ends.tolist())]


class Tails:
    """Writes fields of objects as what is put in the place of another object's last brace: `,"as":value}`.

    Args:
        fields: Names of the fields and what they are called in the other object.
    """

    def __init__(self, fields: Sequence[tuple[str, str]]) -> None:
        self._fields = [name for name, _ in fields]
        names = [name.encode() for name, _ in fields]
        labels = [b"," + json.dumps(name, ensure_ascii=False).encode() + b":" for _, name in fields]
        self._names, self._name_starts = _packed(names)
        self._labels, self._label_starts = _packed(labels)
        self.nulls = read_only(np.frombuffer(b"".join(label + _NULL for label in labels) + b"}", dtype=np.uint8))

    def of(self, batch: RecordBatch, wanted: Bools) -> tuple[Bytes, Ints]:
        """The tails of the wanted records: text and spans [N, 2]; null where a field is missing."""
        count = len(batch.offsets)
        found = np.full((count, len(self._fields), 2), NO_FIELD, dtype=np.int64)
        hard = np.zeros(count, dtype=np.bool_)
        buffer = read_only(batch.buffer)
        _find_fields(buffer, read_only(batch.values), wanted, self._names, self._name_starts, found, hard)
        for row in np.flatnonzero(hard).tolist():
            found[row] = self._find(cast(bytes, batch.value(row)), int(batch.values[row, 0]))
        lengths = np.where(found[:, :, 0] < 0, len(_NULL), found[:, :, 1] - found[:, :, 0]).sum(axis=1)
        lengths = np.where(wanted, lengths + len(self._labels) + 1, 0)
        ends = np.cumsum(lengths)
        text = np.empty(int(ends[-1]) if count else 0, dtype=np.uint8)
        spans = np.stack([ends - lengths, ends], axis=1)
        _write_tails(buffer, found, wanted, self._labels, self._label_starts, spans, text)
        return text, spans

    def _find(self, value: bytes, first: int) -> Ints:
        """The spans [F, 2] of the fields in an object at `first` that is too deep or too strange for the kernel."""
        text = value.decode()
        found = np.full((len(self._fields), 2), NO_FIELD, dtype=np.int64)
        decoder = json.JSONDecoder()
        at = text.index("{")
        while text[at] != "}":
            name, at = scanstring(text, text.index('"', at) + 1)
            start = _skip_space(text, text.index(":", at) + 1)
            _, end = decoder.raw_decode(text, start)
            if name in self._fields:
                spans = len(text[:start].encode()), len(text[:end].encode())
                found[self._fields.index(name)] = first + spans[0], first + spans[1]
            at = _skip_space(text, end)
        return found


def _skip_space(text: str, at: int) -> int:
    while text[at] in " \t\n\r":
        at += 1
    return at


def _packed(texts: list[bytes]) -> tuple[Bytes, Ints]:
    return np.frombuffer(b"".join(texts), dtype=np.uint8), np.cumsum([0, *map(len, texts)], dtype=np.int64)


@kernel
def last_braces(buffer: Bytes, spans: Ints, wanted: Bools) -> Ints:
    """The spans [N, 2] of wanted objects without their last brace and the white space after it."""
    found = np.zeros((len(spans), 2), dtype=np.int64)
    for row in range(len(spans)):
        if wanted[row]:
            end = spans[row, 1] - 1
            while buffer[end] != CLOSE_OBJECT:
                end -= 1
            found[row, 0], found[row, 1] = spans[row, 0], end
    return found


@kernel
def decimal_texts(text: Bytes, spans: Ints, wanted: Bools) -> tuple[Bytes, Ints]:
    """Integers of 8 bytes, little end first, as decimal text and its spans [N, 2]."""
    found = np.empty(20 * len(spans), dtype=np.uint8)
    found_spans = np.zeros((len(spans), 2), dtype=np.int64)
    used = 0
    for row in range(len(spans)):
        if not wanted[row]:
            continue
        start = used
        bits = np.uint64(0)
        for k in range(7, -1, -1):
            bits = bits << np.uint64(8) | np.uint64(text[spans[row, 0] + k])
        value = np.int64(bits)
        if value < 0:
            found[used] = 45
            used += 1
            bits = ~bits + np.uint64(1)
        digits = 1
        rest = bits // np.uint64(10)
        while rest > np.uint64(0):
            digits += 1
            rest //= np.uint64(10)
        for k in range(used + digits - 1, used - 1, -1):
            found[k] = np.uint8(48) + np.uint8(bits % np.uint64(10))
            bits //= np.uint64(10)
        used += digits
        found_spans[row, 0], found_spans[row, 1] = start, used
    return found, found_spans


@kernel
def _join(left: Bytes, left_spans: Ints, right: Bytes, right_spans: Ints, nothing: Bytes) -> tuple[Bytes, Ints]:
    """The texts of `joined`, one after the other, and their ends [N + 1]."""
    ends = np.zeros(len(left_spans) + 1, dtype=np.int64)
    for row in range(len(left_spans)):
        length = left_spans[row, 1] - left_spans[row, 0]
        length += len(nothing) if right_spans[row, 0] < 0 else right_spans[row, 1] - right_spans[row, 0]
        ends[row + 1] = ends[row] + length
    text = np.empty(ends[-1], dtype=np.uint8)
    to, left_at, right_at, nothing_at = address(text), address(left), address(right), address(nothing)
    for row in range(len(left_spans)):
        at = to + ends[row]
        start, end = left_spans[row, 0], left_spans[row, 1]
        copy(at, left_at + start, end - start)
        at += end - start
        start, end = right_spans[row, 0], right_spans[row, 1]
        if start < 0:
            copy(at, nothing_at, len(nothing))
        else:
            copy(at, right_at + start, end - start)
    return text, ends


@kernel
def _find_fields(
    buffer: Bytes, spans: Ints, wanted: Bools, names: Bytes, name_starts: Ints, found: Ints, hard: Bools
) -> None:
    """The spans [N, F, 2] in `buffer` of the values of F fields; of a name that comes twice the last one."""
    longest = 0
    for row in range(len(spans)):
        longest = max(longest, spans[row, 1] - spans[row, 0])
    scratch = np.empty(longest, dtype=np.uint8)
    base = address(buffer)
    for row in range(len(spans)):
        if wanted[row]:
            hard[row] = not _find_in_object(
                base, base + spans[row, 0], base + spans[row, 1], names, name_starts, scratch, found[row]
            )


@kernel
def _find_in_object(base: int, i: int, end: int, names: Bytes, name_starts: Ints, scratch: Bytes, found: Ints) -> bool:
    i = skip_space(i, end)
    if i >= end or byte(i) != OPEN_OBJECT:
        return False
    i = skip_space(i + 1, end)
    while i < end and byte(i) == QUOTE:
        close, escaped = string_end(i + 1, end)
        if close < 0:
            return False
        if escaped:
            length = unescape(i + 1, close, scratch, 0)
            if length < 0:
                return False
            field = matching(address(scratch), length, names, name_starts)
        else:
            field = matching(i + 1, close - i - 1, names, name_starts)
        i = skip_space(close + 1, end)
        if i >= end or byte(i) != COLON:
            return False
        start = skip_space(i + 1, end)
        i = skip_value(start, end) if start < end else FAILED
        if i < 0:
            return False
        if field != NO_FIELD:
            found[field, 0], found[field, 1] = start - base, i - base
        i = skip_space(i, end)
        if i < end and byte(i) == COMMA:
            i = skip_space(i + 1, end)
    return i < end and byte(i) == CLOSE_OBJECT


@kernel
def _write_tails(
    buffer: Bytes, found: Ints, wanted: Bools, labels: Bytes, label_starts: Ints, spans: Ints, text: Bytes
) -> None:
    for row in range(len(spans)):
        if not wanted[row]:
            continue
        at = spans[row, 0]
        for field in range(len(label_starts) - 1):
            length = label_starts[field + 1] - label_starts[field]
            copy(address(text) + at, address(labels) + label_starts[field], length)
            at += length
            start, end = found[row, field, 0], found[row, field, 1]
            if start < 0:
                text[at], text[at + 1], text[at + 2], text[at + 3] = 110, 117, 108, 108
                at += 4
            else:
                copy(address(text) + at, address(buffer) + start, end - start)
                at += end - start
        text[at] = CLOSE_OBJECT
