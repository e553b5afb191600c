"""From JSON records to columns: the compiled scanner for what it can read, a plain reader for the rest.

The plain reader (`read_record`) is what a record means; the scanner is only a faster way to the same columns.
"""

import json
import math
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from streaming.keys import hash_texts
from streaming.plan import Column, Plan
from streaming.records import Bools, Bytes, Floats, Ints, RecordBatch, Reject
from streaming.scan import BOOLEAN, INTEGER, MAX_EPOCH_MS, MIN_EPOCH_MS, REAL, STRING, TIME, scan_values

T = TypeVar("T", bound=np.generic)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BITS = {"tinyint": 8, "smallint": 16, "int": 32, "bigint": 64}
_KINDS = {**dict.fromkeys(_BITS, INTEGER), "float": REAL, "double": REAL, "boolean": BOOLEAN, "string": STRING}
_JSON_NAMES: dict[type, str] = {
    str: "a string",
    int: "an integer",
    float: "a number with a fraction",
    bool: "a boolean",
    list: "an array",
    dict: "an object",
}
_UNMATCHED = b"\xff"  # equals no name, since a name is UTF-8: the keys are scanned once, also where they are counted


class RecordError(ValueError):
    """Why a record cannot be read, in one clause."""


class Record(NamedTuple):
    """What a plan reads of one record: the entity's bytes, microseconds, and one value, text or None a column."""

    entity: bytes
    time_us: int
    values: tuple[float | bytes | None, ...]


class Columns(NamedTuple):
    """What a plan reads of N records; rows that are not `readable` hold anything.

    Attributes:
        readable: [N].
        times: [N] microseconds since 1970 UTC.
        text: Bytes of the entities.
        entities: [N, 2] spans into `text`; an int64 entity is its 8 bytes, little end first.
        values: [N, C] in the order of `Plan.columns`; 0.0 where not present, and for a string of role number or text.
        present: [N, C] false where null or missing.
        texts: [N, T, 2] spans into `text` of the columns of role text, in their order.
        kept: [N] false where a transformation dropped the event, which then only moves the clock.
    """

    readable: Bools
    times: Ints
    text: Bytes
    entities: Ints
    values: Floats
    present: Bools
    texts: Ints
    kept: Bools


class Decoder:
    """Reads the fields of one plan."""

    def __init__(self, plan: Plan) -> None:
        key_kind = STRING if plan.entity_type == "string" else INTEGER
        keys = (plan.entity, plan.timestamp)
        fields: list[str] = []
        self._plan = plan
        self._copied: list[tuple[int, int]] = []  # one field in a second role: from which column to which
        for at, column in enumerate(plan.columns):
            if column.name in fields:
                self._copied.append((fields.index(column.name), at))
            fields.append(column.name)
        shadowed = {at for _, at in self._copied} | {at for at, name in enumerate(fields) if name in keys}
        names = [name.encode() for name in keys]
        names += [_UNMATCHED if at in shadowed else name.encode() for at, name in enumerate(fields)]
        self._names = np.frombuffer(b"".join(names), dtype=np.uint8)
        self._name_starts = np.cumsum([0, *map(len, names)], dtype=np.int64)
        self._kinds = np.array([key_kind, TIME, *(_KINDS[column.type] for column in plan.columns)], dtype=np.int64)
        self._limits = np.array([_limits(kind) for kind in ("bigint", "bigint", *(c.type for c in plan.columns))])
        texts = {c.name: at for at, c in reversed(list(enumerate(plan.columns))) if c.role != "number"}
        self._written = set(texts.values())  # of each text the first column that needs it
        slots = [at if name in texts and at not in shadowed else -1 for at, name in enumerate(fields)]
        self._slots = np.array([-1, -1, *(sorted(set(slots) - {-1}).index(s) if s >= 0 else -1 for s in slots)])
        self._scanned = self._slots.copy()
        for source, at in self._copied:
            self._slots[2 + at] = self._slots[2 + source]
        self._roles = [column.role for column in plan.columns]
        self._keys = [at for at, column in enumerate(plan.columns) if column.name in keys]
        self._required = [at for at, column in enumerate(plan.columns) if not column.nullable]

    def decode(self, batch: RecordBatch) -> tuple[Columns, list[Reject]]:
        """The columns of a batch, and its unreadable records in offset order, each with its reason."""
        count, columns = len(batch.offsets), len(self._plan.columns)
        lengths = batch.values[:, 1] - batch.values[:, 0]
        text = np.empty(int(lengths.sum()) + 8 * count, dtype=np.uint8)
        times = np.zeros(count, dtype=np.int64)
        entities = np.zeros((count, 2), dtype=np.int64)
        texts = np.zeros((count, int(self._slots.max(initial=-1)) + 1, 2), dtype=np.int64)
        values = np.zeros((count, columns), dtype=np.float64)
        present = np.zeros((count, columns), dtype=np.bool_)
        referred = np.zeros(count, dtype=np.bool_)
        fields = (self._names, self._name_starts, self._kinds, self._limits, self._scanned)
        buffer, spans = _frozen(batch.buffer), _frozen(batch.values)
        used = scan_values(buffer, spans, *fields, times, text, entities, texts, values, present, referred)
        for source, at in self._copied:
            present[:, at] = present[:, source]
        present[:, self._keys] = True
        if self._required:
            referred |= ~present[:, self._required].all(axis=1)
        rejects: list[Reject] = []
        for row in np.flatnonzero(referred).tolist():
            try:
                record = read_record(self._plan, batch.value(row))
            except RecordError as error:
                offset = int(batch.offsets[row])
                rejects.append(
                    Reject("dead", batch.partition, offset, str(error), batch.key(row), batch.value(row)),
                )
                continue
            used = _write(text, used, record.entity, entities[row])
            times[row] = record.time_us
            for at, value in enumerate(record.values):
                present[row, at] = value is not None
                values[row, at] = value if isinstance(value, float) else 0.0
                if at in self._written and isinstance(value, bytes):
                    used = _write(text, used, value, texts[row, self._slots[2 + at]])
            referred[row] = False
        return self._in_roles(
            Columns(~referred, times, text, entities, values, present, texts, kept=np.ones(count, dtype=np.bool_))
        ), rejects

    def _in_roles(self, columns: Columns) -> Columns:
        """Hashes what is to be hashed, and leaves of the texts those that are asked for."""
        texts = []
        for at, wanted in enumerate(self._roles):
            if wanted == "number":
                continue
            spans = columns.texts[:, self._slots[2 + at]]
            if wanted == "text":
                texts.append(spans)
            else:
                columns.values[:, at] = np.where(columns.present[:, at], hash_texts(columns.text, spans), 0.0)
        empty = np.zeros((len(columns.times), 0, 2), dtype=np.int64)
        return columns._replace(texts=np.stack(texts, axis=1) if texts else empty)


def _write(text: Bytes, at: int, data: bytes, span: Ints) -> int:
    span[:] = at, at + len(data)
    text[at : at + len(data)] = np.frombuffer(data, dtype=np.uint8)
    return at + len(data)


def read_record(plan: Plan, value: bytes | None) -> Record:
    """Reads one record with the standard library: slow, and the definition of what is accepted.

    Raises:
        RecordError: Why it cannot be read.
    """
    fields = read_object(value)
    entity = _field(fields, plan.entity)
    if plan.entity_type == "string":
        key = _text(plan.entity, entity)
    else:
        key = _integer(plan.entity, entity, "bigint").to_bytes(8, "little", signed=True)
    time_us = read_time_us(plan.timestamp, _field(fields, plan.timestamp))
    values: list[float | bytes | None] = []
    for column in plan.columns:
        if column.name in (plan.entity, plan.timestamp):
            values.append(0.0)
        elif column.nullable and fields.get(column.name) is None:
            values.append(None)
        else:
            values.append(_column_value(column, _field(fields, column.name)))
    return Record(key, time_us, tuple(values))


def read_time_us(name: str, value: object) -> int:
    """Microseconds since 1970 UTC of the timestamp field `name`.

    Raises:
        RecordError: It is neither ISO 8601 text nor integer epoch milliseconds in the years 1 to 9999.
    """
    if type(value) is int:
        if not MIN_EPOCH_MS <= value <= MAX_EPOCH_MS:
            raise RecordError(f"field '{name}' is out of the range of epoch milliseconds (years 1 to 9999)")
        return value * 1000
    if not isinstance(value, str):
        raise RecordError(
            f"field '{name}' holds {_JSON_NAMES[type(value)]}, not an ISO 8601 time or epoch milliseconds"
        )
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise RecordError(f"field '{name}' is not an ISO 8601 time: {value[:40]!r}") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // timedelta(microseconds=1)


def read_object(value: bytes | None) -> dict[str, object]:
    """The fields of a record.

    Raises:
        RecordError: It is no JSON object.
    """
    if value is None:
        raise RecordError("the record has no value")
    try:
        parsed = json.loads(value.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RecordError(f"the value is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise RecordError("the value is nested too deeply") from None
    except ValueError as error:
        raise RecordError(f"the value is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise RecordError(f"the value is {_JSON_NAMES.get(type(parsed), 'null')}, not a JSON object")
    return parsed


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _field(fields: dict[str, object], name: str) -> object:
    value = fields.get(name)
    if value is None:
        raise RecordError(f"field '{name}' is {'null' if name in fields else 'missing'}")
    return value


def _text(name: str, value: object) -> bytes:
    if not isinstance(value, str):
        raise _wrong_type(name, value, "string")
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError:
        raise RecordError(f"field '{name}' holds half a surrogate pair, which is no text") from None


def _integer(name: str, value: object, kind: str) -> int:
    if type(value) is not int:
        raise _wrong_type(name, value, kind)
    lowest, highest = _limits(kind)
    if not lowest <= value <= highest:
        raise RecordError(f"field '{name}' is out of the range of {kind}")
    return value


def _column_value(column: Column, value: object) -> float | bytes:
    name, kind = column.name, column.type
    match kind:
        case "string":
            if column.role != "number":
                return _text(name, value)
            if not isinstance(value, str):
                raise _wrong_type(name, value, kind)
            return 0.0
        case "boolean":
            if not isinstance(value, bool):
                raise _wrong_type(name, value, kind)
            return float(value)
        case "float" | "double":
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise _wrong_type(name, value, kind)
            try:
                real = float(value)
            except OverflowError:
                real = math.inf
            if math.isinf(real):
                raise RecordError(f"field '{name}' is out of the range of {kind}")
            return real
        case _:
            return float(_integer(name, value, kind))


def _wrong_type(name: str, value: object, kind: str) -> RecordError:
    return RecordError(f"field '{name}' holds {_JSON_NAMES[type(value)]} where {kind} is declared")


def _frozen(array: npt.NDArray[T]) -> npt.NDArray[T]:
    """A read-only contiguous view: one type, so that the scanner is compiled once wherever the bytes come from."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


def _limits(kind: str) -> tuple[int, int]:
    bits = _BITS.get(kind, 64)
    return -(1 << bits - 1), (1 << bits - 1) - 1
