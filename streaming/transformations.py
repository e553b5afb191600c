"""A view's transformation of events before they are aggregated: filter, derive, cast, rename.

It sees a batch of events as typed Arrow columns, the fields of the source's schema, and returns such a batch. It may
drop rows, add columns and change them; it may not add or reorder rows. It is applied after decoding and before any
state changes, so a record for which it raises harms nothing.

Declared by the view's `udf` (mode `pandas`: DataFrame to DataFrame; mode `python`: a dict of lists to a dict of lists),
or by the tag `millrace.transformation: package.module:function`, a function of a RecordBatch, which goes first.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from streaming import arrow_columns
from streaming.decode import Columns, Decoder
from streaming.keys import texts_of
from streaming.plan import ColumnType, Plan
from streaming.records import Ints, RecordBatch, Reject

ROW = "__row"
ARROW_TYPES: dict[ColumnType, pa.DataType] = {
    "tinyint": pa.int8(),
    "smallint": pa.int16(),
    "int": pa.int32(),
    "bigint": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "boolean": pa.bool_(),
    "string": pa.string(),
}

Function = Callable[[pa.RecordBatch], pa.RecordBatch]


class TransformationError(ValueError):
    """A transformation that cannot be found, or that returned what it must not, in one sentence."""


def named(reference: str) -> Function:
    """The function of `package.module:function`.

    Raises:
        TransformationError: There is none.
    """
    module, _, name = reference.partition(":")
    try:
        function: Function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise TransformationError(
            f"There is no transformation '{reference}' ({error}): write package.module:function, importable from where"
            " the job runs."
        ) from None
    return function


def of_pandas(udf: Callable[[Any], Any]) -> Function:
    """A udf of a DataFrame as a function of a batch."""

    def apply(batch: pa.RecordBatch) -> pa.RecordBatch:
        return _from_table(pa.Table.from_pandas(udf(batch.to_pandas()), preserve_index=False))

    return apply


def of_python(udf: Callable[[dict[str, list[Any]]], dict[str, list[Any]]]) -> Function:
    """A udf of a dict of lists as a function of a batch."""

    def apply(batch: pa.RecordBatch) -> pa.RecordBatch:
        return _from_table(pa.table(udf(batch.to_pydict())))

    return apply


def chained(functions: list[Function]) -> Function:
    """Functions applied one after the other."""

    def apply(batch: pa.RecordBatch) -> pa.RecordBatch:
        for function in functions:
            batch = function(batch)
        return batch

    return apply


def output_types(function: Function, fields: dict[str, pa.DataType]) -> dict[str, ColumnType | None]:
    """The types of the columns that a transformation gives for these, found by applying it to no rows.

    None stands for a type that no rows do not show, such as that of a new Python list.

    Raises:
        TransformationError: It fails on a batch without rows.
    """
    empty = pa.RecordBatch.from_pydict({name: pa.array([], found) for name, found in fields.items()})
    try:
        given = function(empty).schema
    except Exception as error:
        raise TransformationError(f"The transformation fails on a batch without rows: {error!r}") from error
    found: dict[str, ColumnType | None] = {}
    for field in given:
        declared = fields.get(field.name, pa.null()) if pa.types.is_null(field.type) else field.type
        if pa.types.is_null(declared):
            found[field.name] = None
        name = next((name for name, arrow_type in ARROW_TYPES.items() if arrow_type == declared), None)
        if name is not None:
            found[field.name] = name
        elif pa.types.is_large_string(declared):
            found[field.name] = "string"
    return found


class Reader:
    """Reads records and Arrow tables as the columns of a plan, through its transformation where it has one.

    The columns of models hold nothing yet.

    Attributes:
        source: The plan whose columns the input must have.
    """

    def __init__(self, plan: Plan) -> None:
        self._added = len(plan.models)
        self._plan = replace(plan, columns=plan.fields, models=())
        self._function = plan.transformation
        self.source = self._plan
        if plan.transformation is not None:
            self.source = replace(self._plan, columns=plan.source, transformation=None)
        self._decoder = Decoder(self.source)

    def decode(self, batch: RecordBatch) -> tuple[Columns, list[Reject]]:
        """The columns of a batch, and its unreadable records in offset order, each with its reason."""
        columns, rejects = self._decoder.decode(batch)
        columns, refused = self._apply(columns, batch.partition, batch.offsets)
        columns = self._widened(columns)
        if not refused:
            return columns, rejects
        rows = np.searchsorted(batch.offsets, [reject.offset for reject in refused]).tolist()
        rejects += [
            reject._replace(key=batch.key(row), value=batch.value(row))
            for reject, row in zip(refused, rows, strict=True)
        ]
        return columns, sorted(rejects, key=lambda reject: reject.offset)

    def convert(self, batch: pa.RecordBatch, partition: int, offsets: Ints) -> tuple[Columns, list[Reject]]:
        """The columns of N rows of a schema that was checked for `source`, and the refused rows in offset order."""
        columns, rejects = arrow_columns.columns(self.source, batch, partition, offsets)
        columns, refused = self._apply(columns, partition, offsets)
        return self._widened(columns), sorted([*rejects, *refused], key=lambda reject: reject.offset)

    def _widened(self, columns: Columns) -> Columns:
        if not self._added:
            return columns
        nothing = np.zeros((len(columns.times), self._added))
        return columns._replace(
            values=np.hstack([columns.values, nothing]), present=np.hstack([columns.present, nothing.astype(np.bool_)])
        )

    def _apply(self, columns: Columns, partition: int, offsets: Ints) -> tuple[Columns, list[Reject]]:
        if self._function is None:
            return columns, []
        given = self._batch(columns)
        changed = self._function(given)
        rows = _rows(changed, given)
        changed = changed.drop_columns([ROW]) if ROW in changed.schema.names else changed
        arrow_columns.check_schema(self._plan, changed.schema, "What the transformation gives")
        found, refused = arrow_columns.columns(self._plan, changed, partition, offsets[rows])
        return _spread(found, rows, columns), refused

    def _batch(self, columns: Columns) -> pa.RecordBatch:
        """The readable events as typed Arrow columns, and the number of each."""
        rows = np.flatnonzero(columns.readable)
        entities = columns.entities[rows]
        arrays: dict[str, pa.Array] = {}
        if self._plan.entity_type == "string":
            arrays[self._plan.entity] = texts_of(columns.text, entities)
        else:
            starts = entities[:, :1] + np.arange(8)
            arrays[self._plan.entity] = pa.array(columns.text[starts].view(np.int64).reshape(-1))
        arrays[self._plan.timestamp] = pa.array(columns.times[rows], pa.timestamp("us", tz="UTC"))
        texts = 0
        for at, column in enumerate(self.source.columns):
            missing = ~columns.present[rows, at]
            if column.role == "text":
                found = texts_of(columns.text, np.where(missing[:, None], 0, columns.texts[rows, texts]))
                texts += 1
                arrays[column.name] = pa.array(found.to_pylist(), pa.string(), mask=missing) if missing.any() else found
            else:
                values = columns.values[rows, at]
                arrays[column.name] = pa.array(values, mask=missing).cast(ARROW_TYPES[column.type], safe=False)
        return pa.RecordBatch.from_pydict({**arrays, ROW: pa.array(rows)})


def _from_table(table: pa.Table) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([column.combine_chunks() for column in table.columns], names=table.column_names)


def _rows(changed: pa.RecordBatch, given: pa.RecordBatch) -> Ints:
    """Which events the rows of a transformed batch are."""
    if ROW in changed.schema.names:
        rows: Ints = changed.column(ROW).to_numpy(zero_copy_only=False).astype(np.int64)
        if len(rows) < 2 or (np.diff(rows) > 0).all():
            return rows
        raise TransformationError(
            "The transformation added or reordered rows: it may only drop rows and change columns."
        )
    if changed.num_rows == given.num_rows:
        same: Ints = given.column(ROW).to_numpy()
        return same
    raise TransformationError(
        f"The transformation made {changed.num_rows} rows of {given.num_rows} without the column '{ROW}' that says"
        " which: filter the batch that it gets instead of making a new one."
    )


def _spread(found: Columns, rows: Ints, columns: Columns) -> Columns:
    """The columns of the rows that are left, at their places; the others only move the clock."""
    count = len(columns.times)
    readable, kept = columns.readable.copy(), np.zeros(count, dtype=np.bool_)
    readable[rows], kept[rows] = found.readable, True
    times = columns.times.copy()
    times[rows] = np.where(found.readable, found.times, times[rows])
    entities, texts = np.zeros((count, 2), dtype=np.int64), np.zeros((count, *found.texts.shape[1:]), dtype=np.int64)
    values, present = np.zeros((count, found.values.shape[1])), np.zeros((count, found.values.shape[1]), dtype=np.bool_)
    entities[rows], texts[rows], values[rows], present[rows] = found.entities, found.texts, found.values, found.present
    return Columns(readable, times, found.text, entities, values, present, texts, kept)
