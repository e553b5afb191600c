"""Feast's own bytes, made from whole Arrow columns: entity keys (serialization version 3) and `Value` protos."""

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from feast.protos.feast.types.Value_pb2 import ValueType
from feast.types import Array, Float32, Float64, Int32, Int64, String

from streaming.records import Ints

ARROW_TYPES: dict[Any, pa.DataType] = {
    Int64: pa.int64(),
    Int32: pa.int64(),
    Float64: pa.float64(),
    Float32: pa.float32(),
    String: pa.string(),
    Array(String): pa.list_(pa.string()),
}
EMPTY = pa.scalar(b"", pa.binary())
INT32, INT64, STRING, DOUBLE, FLOAT = b"\x18", b"\x20", b"\x12", b"\x29", b"\x35"  # field number and wire type
STRING_LIST, LIST_ITEM = b"\x62", b"\x0a"


def entity_keys(join_key: str, entities: pa.Array) -> pa.BinaryArray:
    """The serialised entity keys of one join key.

    Args:
        join_key: name of the entity's column.
        entities: string or int64, N of them, no nulls.
    """
    name = join_key.encode()
    prefix = struct.pack("<III", 1, ValueType.STRING, len(name)) + name
    if pa.types.is_string(entities.type):
        data = entities.cast(pa.binary())
        sizes = _fixed_binary(pc.binary_length(data).to_numpy().astype("<u4"))
        return _join(pa.scalar(prefix + struct.pack("<I", ValueType.STRING), pa.binary()), sizes, data)
    start = pa.scalar(prefix + struct.pack("<II", ValueType.INT64, 8), pa.binary())
    return _join(start, _fixed_binary(entities.to_numpy().astype("<i8")))


def value_protos(column: pa.ChunkedArray, dtype: Any) -> pa.BinaryArray:
    """A column as serialised `feast.types.Value` protos; a null is the empty message, as Feast writes it.

    Args:
        column: N values, nulls allowed, that can be cast to `ARROW_TYPES[dtype]`.
        dtype: one of `ARROW_TYPES`.

    Raises:
        pyarrow.ArrowInvalid: values that are not of this type.
    """
    array = column.cast(ARROW_TYPES[dtype]).combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # pyarrow gives a chunked array back where there is no chunk
        array = pa.concat_arrays(array.chunks)
    if dtype == String:
        protos = _delimited(STRING, array.cast(pa.binary()).fill_null(b""))
    elif dtype == Array(String):
        protos = _delimited(STRING_LIST, _list_items(array))
    elif dtype in (Int64, Int32):
        numbers = _varints(array.fill_null(0).to_numpy())
        protos = _join(pa.scalar(INT64 if dtype == Int64 else INT32, pa.binary()), numbers)
    else:
        numbers = _fixed_binary(array.fill_null(0).to_numpy())
        protos = _join(pa.scalar(DOUBLE if dtype == Float64 else FLOAT, pa.binary()), numbers)
    return pc.if_else(array.is_valid(), protos, EMPTY) if array.null_count else protos


def as_bytes(array: pa.Array) -> list[bytes]:
    """The values of a binary array."""
    found: list[bytes] = array.to_numpy(zero_copy_only=False).tolist()
    return found


def _list_items(lists: pa.ListArray) -> pa.BinaryArray:
    """The inner messages of `StringList`: the items of one list lie side by side, so only offsets are computed."""
    items = lists.flatten()  # without those of null lists
    protos = _delimited(LIST_ITEM, items.cast(pa.binary()).fill_null(b""))
    ends = np.concatenate([[0], np.cumsum(pc.binary_length(protos).to_numpy())])
    counts = lists.value_lengths().fill_null(0).to_numpy()
    offsets = ends[np.concatenate([[0], np.cumsum(counts)])].astype(np.int32)
    return pa.BinaryArray.from_buffers(pa.binary(), len(lists), [None, pa.py_buffer(offsets), protos.buffers()[2]])


def _delimited(tag: bytes, data: pa.BinaryArray) -> pa.BinaryArray:
    return _join(pa.scalar(tag, pa.binary()), _varints(pc.binary_length(data).to_numpy()), data)


def _varints(numbers: Ints) -> pa.BinaryArray:
    unsigned = numbers.astype(np.int64).astype(np.uint64)
    width = max(1, -(-int(unsigned.max(initial=0)).bit_length() // 7))
    groups = unsigned[:, None] >> np.arange(0, 7 * width, 7, dtype=np.uint64)
    sizes = np.maximum(1, (groups != 0).sum(axis=1))
    data = ((groups & np.uint64(0x7F)) | np.uint64(0x80)).astype(np.uint8)
    data[np.arange(len(numbers)), sizes - 1] &= 0x7F
    kept = data[np.arange(width) < sizes[:, None]]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.BinaryArray.from_buffers(pa.binary(), len(numbers), [None, pa.py_buffer(offsets), pa.py_buffer(kept)])


def _fixed_binary(values: npt.NDArray[Any]) -> pa.BinaryArray:
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    kind = pa.binary(values.itemsize)
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, buffer]).cast(pa.binary())


def _join(*parts: pa.Array | pa.Scalar) -> pa.BinaryArray:
    return pc.binary_join_element_wise(*parts, EMPTY)
