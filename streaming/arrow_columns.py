"""From Arrow to the columns of a plan, with the meaning that the same fields have in a JSON record.

A timestamp may be of any unit (finer than a microsecond is cut off), ISO 8601 text or epoch milliseconds; without a
zone it is UTC. NaN is a missing value, as pandas and Feast take it. A column of a wrong type is an error of the whole
table; a value that the plan refuses makes its row a reject.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from streaming.decode import Columns, RecordError, read_time_us
from streaming.keys import hash_texts
from streaming.plan import Column, Plan
from streaming.records import Bools, Bytes, Floats, Ints, Reject
from streaming.scan import MAX_EPOCH_MS, MIN_EPOCH_MS

_BITS = {"tinyint": 8, "smallint": 16, "int": 32, "bigint": 64}
_US_A_TICK = {"s": 1_000_000, "ms": 1_000, "us": 1}

Refuse = Callable[[Bools, str], None]


class TableError(ValueError):
    """A table that does not hold what a plan reads, in one sentence."""


def check_schema(plan: Plan, schema: pa.Schema, where: str) -> None:
    """Makes sure that `columns` can read tables of this schema.

    Raises:
        TableError: Names the column and what is wrong with it.
    """
    text = "string" if plan.entity_type == "string" else "an integer"
    for name, fits, wanted in (
        (plan.entity, _is_text if plan.entity_type == "string" else pa.types.is_integer, text),
        (plan.timestamp, _is_time, "a timestamp, ISO 8601 text or epoch milliseconds"),
    ):
        if name not in schema.names:
            raise TableError(f"{where} has no column '{name}', which view '{plan.view}' reads: {_has(schema)}.")
        if not fits(_plain(schema.field(name).type)):
            raise TableError(f"Column '{name}' of {where} is {schema.field(name).type}: it must be {wanted}.")
    for column in plan.columns:
        if column.name in (plan.entity, plan.timestamp) or (column.nullable and column.name not in schema.names):
            continue
        if column.name not in schema.names:
            raise TableError(f"{where} has no column '{column.name}', which is declared not null: {_has(schema)}.")
        found = _plain(schema.field(column.name).type)
        if not (_fits(column, found) or pa.types.is_null(found)):
            raise TableError(f"Column '{column.name}' of {where} is {found}: view '{plan.view}' reads {column.type}.")


def names(plan: Plan) -> list[str]:
    """The columns that a plan reads, each once."""
    return list(dict.fromkeys([plan.entity, plan.timestamp, *(column.name for column in plan.columns)]))


def columns(plan: Plan, batch: pa.RecordBatch, partition: int, offsets: Ints) -> tuple[Columns, list[Reject]]:
    """The columns of N rows of a checked schema, and the refused rows in offset order, each with its first reason."""
    reasons: dict[int, str] = {}
    readable = np.ones(batch.num_rows, dtype=np.bool_)

    def refuse(rows: Bools, reason: str) -> None:
        for row in np.flatnonzero(rows & readable).tolist():
            reasons[row] = reason
        readable[rows] = False

    times = _times(plan.timestamp, _array(batch, plan.timestamp), refuse)
    text, entities = _entities(plan, _array(batch, plan.entity), refuse)
    texts: list[Ints] = []
    values = np.zeros((batch.num_rows, len(plan.columns)))
    present = np.ones(values.shape, dtype=np.bool_)
    for at, column in enumerate(plan.columns):
        if column.name in (plan.entity, plan.timestamp):
            continue
        if column.name in batch.schema.names:
            values[:, at], present[:, at] = _values(column, _array(batch, column.name), refuse)
        else:
            present[:, at] = False
        if column.role != "number":
            more, spans = _texts(batch, column.name)
            if column.role == "hash":
                values[:, at] = np.where(present[:, at], hash_texts(more, spans), 0.0)
            else:
                texts.append(spans + len(text))
                text = np.concatenate([text, more])
        if not column.nullable:
            refuse(~present[:, at], f"field '{column.name}' is null")
    rejects = [Reject("dead", partition, int(offsets[row]), reasons[row], None, None) for row in sorted(reasons)]
    spans_of_texts = np.stack(texts, axis=1) if texts else np.zeros((batch.num_rows, 0, 2), dtype=np.int64)
    kept = np.ones(batch.num_rows, dtype=np.bool_)
    return Columns(readable, times, text, entities, values, present, spans_of_texts, kept), rejects


def _times(name: str, array: pa.Array, refuse: Refuse) -> Ints:
    valid = _valid(array)
    refuse(~valid, f"field '{name}' is null")
    if _is_text(array.type):
        return _read_times(name, array, valid, refuse)
    if pa.types.is_date(array.type):
        array = array.cast(pa.timestamp("s") if pa.types.is_date32(array.type) else pa.timestamp("ms"))
    ticks = _integers(array)
    if pa.types.is_timestamp(array.type) and array.type.unit == "ns":
        times = ticks // 1_000
    else:
        scale = _US_A_TICK[array.type.unit if pa.types.is_timestamp(array.type) else "ms"]
        far = np.abs(ticks) > MAX_EPOCH_MS * 1_000 // scale
        times = np.where(far, MAX_EPOCH_MS * 2_000, ticks * scale) if far.any() else ticks * scale
    refuse(
        valid & ((times < MIN_EPOCH_MS * 1_000) | (times >= (MAX_EPOCH_MS + 1) * 1_000)),
        f"field '{name}' is out of the years 1 to 9999",
    )
    return times


def _read_times(name: str, array: pa.Array, valid: Bools, refuse: Refuse) -> Ints:
    times = np.zeros(len(array), dtype=np.int64)
    for row, text in enumerate(array.to_pylist()):
        if text is None:
            continue
        try:
            times[row] = read_time_us(name, text)
        except RecordError as error:
            refuse(np.arange(len(array)) == row, str(error))
    return times


def _entities(plan: Plan, array: pa.Array, refuse: Refuse) -> tuple[Bytes, Ints]:
    refuse(~_valid(array), f"field '{plan.entity}' is null")
    if plan.entity_type == "int64":
        spans = np.empty((len(array), 2), dtype=np.int64)
        if array.type == pa.uint64():
            large = pc.fill_null(array, 0).to_numpy() >= np.uint64(1 << 63)
            refuse(large, f"field '{plan.entity}' is out of the range of bigint")
        spans[:, 0] = np.arange(len(array)) * 8
        spans[:, 1] = spans[:, 0] + 8
        return _integers(array).view(np.uint8), spans
    return _spans(array)


def _texts(batch: pa.RecordBatch, name: str) -> tuple[Bytes, Ints]:
    """The bytes of a column of text and the span of each row, empty where null or where there is no such column."""
    if name not in batch.schema.names:
        return np.zeros(8, dtype=np.uint8), np.zeros((batch.num_rows, 2), dtype=np.int64)
    return _spans(pc.fill_null(_array(batch, name).cast(pa.string()), ""))


def _spans(array: pa.Array) -> tuple[Bytes, Ints]:
    spans = np.empty((len(array), 2), dtype=np.int64)
    wide = pa.types.is_large_string(array.type)
    if not (wide or pa.types.is_string(array.type)):
        array = array.cast(pa.string())
    _, starts, data = array.buffers()
    width = np.int64 if wide else np.int32
    ends = np.frombuffer(starts, dtype=width, count=array.offset + len(array) + 1)[array.offset :]
    spans[:, 0], spans[:, 1] = ends[:-1], ends[1:]
    text = np.empty(0, dtype=np.uint8) if data is None else np.frombuffer(data, dtype=np.uint8)
    return text, spans


def _values(column: Column, array: pa.Array, refuse: Refuse) -> tuple[Floats, Bools]:
    present = _valid(array)
    nothing = np.zeros(len(array))
    if column.type == "string" or pa.types.is_null(array.type):
        return nothing, present
    if pa.types.is_boolean(array.type):
        return pc.fill_null(array, False).cast(pa.int8()).to_numpy().astype(np.float64), present
    if pa.types.is_integer(array.type):
        numbers = pc.fill_null(array, 0).to_numpy()
        if column.type in _BITS:
            limit = 1 << _BITS[column.type] - 1
            out = (numbers >= limit) if numbers.dtype.kind == "u" else (numbers >= limit) | (numbers < -limit)
            refuse(out, f"field '{column.name}' is out of the range of {column.type}")
        return numbers.astype(np.float64), present
    reals = pc.fill_null(array.cast(pa.float64()), np.nan).to_numpy(zero_copy_only=False)
    present = present & ~np.isnan(reals)
    reals = np.where(present, reals, 0.0)
    refuse(np.isinf(reals), f"field '{column.name}' is out of the range of {column.type}")
    if column.type in _BITS:
        beyond = float(1 << _BITS[column.type] - 1)
        wrong = np.isfinite(reals) & (reals != np.floor(reals))
        refuse(wrong, f"field '{column.name}' holds a number with a fraction where {column.type} is declared")
        refuse((reals >= beyond) | (reals < -beyond), f"field '{column.name}' is out of the range of {column.type}")
    return reals, present


def _array(batch: pa.RecordBatch, name: str) -> pa.Array:
    array = batch.column(batch.schema.get_field_index(name))
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _integers(array: pa.Array) -> Ints:
    """The int64 of an array, 0 where null."""
    if array.null_count:
        array = pc.fill_null(array, pa.scalar(0, pa.int64()).cast(array.type))
    whole = array.cast(pa.int64(), safe=False) if array.type != pa.int64() else array
    return np.asarray(whole.to_numpy(zero_copy_only=False))


def _valid(array: pa.Array) -> Bools:
    if not array.null_count:
        return np.ones(len(array), dtype=np.bool_)
    return np.asarray(array.is_valid().to_numpy(zero_copy_only=False))


def _fits(column: Column, found: pa.DataType) -> bool:
    if column.type == "string":
        return _is_text(found)
    if column.type == "boolean":
        return bool(pa.types.is_boolean(found))
    return bool(pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_decimal(found))


def _plain(found: pa.DataType) -> pa.DataType:
    return found.value_type if pa.types.is_dictionary(found) else found


def _is_text(found: pa.DataType) -> bool:
    return bool(pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found))


def _is_time(found: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(found) or pa.types.is_date(found) or pa.types.is_int64(found) or _is_text(found))


def _has(schema: pa.Schema) -> str:
    return f"it has {', '.join(schema.names)}"
