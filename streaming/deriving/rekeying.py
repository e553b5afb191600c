"""Events under another key: the operator of `derived.rekeyed`, which has no state.

The key is the text of a field. A kernel finds it; what it is not certain of (escapes, broken JSON, other types) the
plain reader decides.
"""

import numpy as np

from streaming.compile_kernels import kernel
from streaming.decode import RecordError, read_object
from streaming.derived import Derived
from streaming.deriving.derivation import Derivation
from streaming.deriving.stateless import Stateless
from streaming.deriving.transactions import NO_EVENT_US
from streaming.json_tokens import (
    CLOSE_OBJECT,
    COLON,
    COMMA,
    FAILED,
    MINUS,
    OPEN_OBJECT,
    QUOTE,
    number,
    skip_space,
    skip_value,
    string_end,
)
from streaming.memory import address, byte
from streaming.records import Bytes, Ints, RecordBatch, Reject

_ZERO = 48


class Rekeying(Stateless):
    """One record out for each that has the key: its value as it came.

    Args:
        derivation: what is asked for.
    """

    def __init__(self, derivation: Derivation) -> None:
        self.clocks_us = (NO_EVENT_US,)
        self._field = derivation.key
        self._name = np.frombuffer(derivation.key.encode(), dtype=np.uint8)

    def process(self, side: int, batch: RecordBatch, now_us: int) -> Derived:
        """Give each record its new key; those without one are dead."""
        spans = np.full((len(batch.offsets), 2), -1, dtype=np.int64)
        buffer = np.ascontiguousarray(batch.buffer).view()
        buffer.flags.writeable = False  # one type, so that the kernel is compiled once wherever the bytes come from
        find_texts(buffer, np.ascontiguousarray(batch.values), self._name, spans)
        data = buffer.tobytes()
        keys = [data[start:end] for start, end in zip(spans[:, 0].tolist(), spans[:, 1].tolist(), strict=True)]
        values = [data[a:b] for a, b in zip(batch.values[:, 0].tolist(), batch.values[:, 1].tolist(), strict=True)]
        rejects: list[tuple[int, Reject]] = []
        refused: set[int] = set()
        for row in np.flatnonzero(spans[:, 0] < 0).tolist():
            value = batch.value(row)
            try:
                keys[row] = self._read(value)
            except RecordError as error:
                at = int(batch.offsets[row])
                rejects.append((side, Reject("dead", batch.partition, at, str(error), batch.key(row), value)))
                refused.add(row)
        if refused:
            keys, values = ([one for row, one in enumerate(each) if row not in refused] for each in (keys, values))
        return Derived(keys, values, rejects)

    def _read(self, value: bytes | None) -> bytes:
        fields = read_object(value)
        found = fields.get(self._field)
        if isinstance(found, bool) or not isinstance(found, str | int):
            how = "missing" if self._field not in fields else "null" if found is None else "no string and no integer"
            raise RecordError(f"the key '{self._field}' is {how}")
        try:
            return str(found).encode()
        except UnicodeEncodeError:
            raise RecordError(f"the key '{self._field}' holds half a surrogate pair, which is no text") from None


@kernel
def find_texts(buffer: Bytes, values: Ints, name: Bytes, spans: Ints) -> None:
    """Fill `spans` with where in `buffer` the text of the field `name` is; what is not filled must be read plainly.

    Args:
        buffer: Holds the values.
        values: [N, 2] start and end of each value; start -1 is a null.
        name: UTF-8.
        spans: [N, 2] out, of a string between its quotes, or of an integer.
    """
    base = address(buffer)
    for row in range(len(values)):
        if values[row, 0] >= 0:
            start, end = _find_text(base + values[row, 0], base + values[row, 1], name)
            if start != FAILED:
                spans[row, 0], spans[row, 1] = start - base, end - base


@kernel
def _find_text(i: int, end: int, name: Bytes) -> tuple[int, int]:
    """Where the text of the last field called `name` of the object at i is, or -1."""
    refused = FAILED, FAILED
    found = refused
    i = skip_space(i, end)
    if i >= end or byte(i) != OPEN_OBJECT:
        return refused
    while True:
        i = skip_space(i + 1, end)
        if i >= end or byte(i) != QUOTE:
            return refused
        close, escaped = string_end(i + 1, end)
        if close < 0 or escaped:
            return refused
        same = close - i - 1 == len(name)
        k = 0
        while same and k < len(name):
            same = byte(i + 1 + k) == name[k]
            k += 1
        i = skip_space(close + 1, end)
        if i >= end or byte(i) != COLON:
            return refused
        i = skip_space(i + 1, end)
        if i >= end:
            return refused
        start = i
        i = skip_value(i, end)
        if i < 0:
            return refused
        if same:
            found = _text(start, i)
        i = skip_space(i, end)
        if i < end and byte(i) == CLOSE_OBJECT and skip_space(i + 1, end) == end:
            return found
        if i >= end or byte(i) != COMMA:
            return refused


@kernel
def _text(start: int, end: int) -> tuple[int, int]:
    """The text of the valid value between two positions: of a string without escapes or a plain integer; else -1."""
    if byte(start) == QUOTE:
        _, escaped = string_end(start + 1, end)
        if not escaped:
            return start + 1, end - 1
    elif byte(start) == MINUS or _ZERO <= byte(start) < _ZERO + 10:
        _, integer, negative, _, digits, _ = number(start, end)
        if integer and (digits > 0 or not negative):  # -0 is 0
            return start, end
    return FAILED, FAILED
