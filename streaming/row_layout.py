"""One online row of a view as one blob, and back: null bits, 8 bytes for a number, the rest as protos at the end.

A blob is `features // 8 + 1` bytes of null bits (lowest first), then a slot a feature in the layout's order: 8 bytes
(int64 or float64) for a number, bool or timestamp, 4 bytes (uint32) with the size of its proto for anything else; then
those protos in the same order. All little-endian. A layout is kept beside the rows, so that a view whose features
change goes on reading its old rows.
"""

import json
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from feast import FeatureView
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Bool, Float32, Float64, Int32, Int64, UnixTimestamp

from streaming.feast_bytes import ARROW_TYPES, EMPTY, value_protos
from streaming.records import Bools

PROTO = "proto"
KINDS: dict[Any, str] = {
    Int64: "int64_val",
    Int32: "int32_val",
    Bool: "bool_val",
    UnixTimestamp: "unix_timestamp_val",
    Float64: "double_val",
    Float32: "float_val",
}
INTEGERS = ("int64_val", "int32_val", "bool_val", "unix_timestamp_val")
VALUES: dict[str, Callable[[Any], Value]] = {
    "int64_val": lambda value: Value(int64_val=value),
    "int32_val": lambda value: Value(int32_val=value),
    "bool_val": lambda value: Value(bool_val=bool(value)),
    "unix_timestamp_val": lambda value: Value(unix_timestamp_val=value),
    "double_val": lambda value: Value(double_val=value),
    "float_val": lambda value: Value(float_val=value),
}


class Column(NamedTuple):
    """N values of one feature: numbers (0 where null) or serialised protos (empty where null), and where they are."""

    values: npt.NDArray[Any] | pa.BinaryArray
    nulls: Bools


class RowLayout:
    """Names of the features of a row, in order, each with its kind: a member of Feast's `Value`, or "proto"."""

    def __init__(self, features: Sequence[tuple[str, str]]) -> None:
        self.features = tuple(features)
        slots = ["<u4" if kind == PROTO else "<i8" if kind in INTEGERS else "<f8" for _, kind in self.features]
        null_bytes = 1 + len(slots) // 8
        self._head = np.dtype([("nulls", np.uint8, (null_bytes,)), *((str(at), slot) for at, slot in enumerate(slots))])
        codes = {"<u4": "I", "<i8": "q", "<f8": "d"}
        self._struct = struct.Struct(f"<{null_bytes}s" + "".join(codes[slot] for slot in slots))

    @classmethod
    def parse(cls, text: str) -> "RowLayout":
        """The layout that `str` wrote."""
        return cls([(name, kind) for name, kind in json.loads(text)])

    def __str__(self) -> str:
        return json.dumps(self.features)

    def rows(self, columns: Sequence[Column], size: int) -> pa.Array:
        """The blobs of N rows, binary or fixed-size binary.

        Args:
            columns: one a feature, in the layout's order.
            size: N.
        """
        head = np.zeros(size, dtype=self._head)
        nulls = np.column_stack([np.zeros(size, dtype=np.bool_), *(column.nulls for column in columns)])[:, 1:]
        packed = np.packbits(nulls, axis=1, bitorder="little")
        head["nulls"][:, : packed.shape[1]] = packed
        protos = []
        for at, ((_, kind), (values, _)) in enumerate(zip(self.features, columns, strict=True)):
            head[str(at)] = pc.binary_length(values).to_numpy() if kind == PROTO else values
            if kind == PROTO:
                protos.append(values)
        kind = pa.binary(self._head.itemsize)
        blobs = pa.FixedSizeBinaryArray.from_buffers(kind, len(head), [None, pa.py_buffer(head)])
        return pc.binary_join_element_wise(blobs.cast(pa.binary()), *protos, EMPTY) if protos else blobs

    def read(self, row: bytes, wanted: Collection[str]) -> dict[str, Value]:
        """The wanted features of a blob, without those that the layout does not have; a null is an empty value."""
        null_bytes, *slots = self._struct.unpack_from(row)
        nulls = int.from_bytes(null_bytes, "little")
        found = {}
        start = self._struct.size
        for at, (name, kind) in enumerate(self.features):
            end = start + slots[at] if kind == PROTO else start
            if name in wanted:
                if nulls >> at & 1:
                    found[name] = Value()
                else:
                    found[name] = Value.FromString(row[start:end]) if kind == PROTO else VALUES[kind](slots[at])
            start = end
        return found


def declared(view: FeatureView) -> list[tuple[str, str]]:
    """The features of a view, without its join keys, and the kinds in which they are kept."""
    keys = set(view.join_keys)
    return [(field.name, KINDS.get(field.dtype, PROTO)) for field in view.features if field.name not in keys]


def from_arrow(column: pa.ChunkedArray, dtype: Any) -> Column:
    """A feature's column.

    Args:
        column: N values, nulls allowed.
        dtype: Feast type of the feature, one of `feast_bytes.ARROW_TYPES`.

    Raises:
        pyarrow.ArrowInvalid: values that are not of this type.
    """
    nulls = column.is_null().to_numpy()
    if dtype not in KINDS:
        return Column(value_protos(column, dtype), nulls)
    numbers = column if column.type == ARROW_TYPES[dtype] else column.cast(ARROW_TYPES[dtype], safe=False)
    return Column((numbers.fill_null(0) if numbers.null_count else numbers).to_numpy(), nulls)


def encode_values(rows: Sequence[dict[str, Value]], kinds: Mapping[str, str]) -> tuple[RowLayout, pa.Array]:
    """The blobs of N rows that name the same features.

    Args:
        rows: feature to value.
        kinds: feature to its declared kind; a column with a value of another kind, or of none, is kept as protos.
    """
    columns = {name: _from_values([row[name] for row in rows], kinds.get(name, PROTO)) for name in rows[0]}
    layout = RowLayout([(name, kind) for name, (_, kind) in columns.items()])
    return layout, layout.rows([column for column, _ in columns.values()], len(rows))


def _from_values(values: Sequence[Value], kind: str) -> tuple[Column, str]:
    members = [value.WhichOneof("val") for value in values]
    nulls = [member in (None, "null_val") for member in members]
    mask = np.array(nulls, dtype=np.bool_)
    if kind != PROTO and all(null or member == kind for null, member in zip(nulls, members, strict=True)):
        numbers = [0 if null else getattr(value, kind) for null, value in zip(nulls, values, strict=True)]
        return Column(np.array(numbers, dtype=np.int64 if kind in INTEGERS else np.float64), mask), kind
    protos = [b"" if null else value.SerializeToString() for null, value in zip(nulls, values, strict=True)]
    return Column(pa.array(protos, pa.binary()), mask), PROTO
