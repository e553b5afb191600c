"""Tensors of the Open Inference Protocol v2, as JSON and as binary blobs.

Binary data are little-endian and row-major; BYTES elements carry a u32 length each, BOOL takes one byte.
Specification: https://github.com/kserve/open-inference-protocol and Triton's binary tensor data extension.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.errors import bad_request

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    **{f"INT{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    "BYTES": np.dtype(object),
}


@dataclass(frozen=True)
class Tensor:
    """A named tensor; `data` has `shape`, and holds `bytes` objects for BYTES."""

    name: str
    datatype: str
    data: npt.NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self.data.shape


def read(declared: Mapping[str, Any], blob: bytes | None) -> Tensor:
    """A tensor of a request: from its JSON `data`, or from a blob.

    Raises:
        ServingError: status 400, naming the tensor and what is wrong with it.
    """
    name = declared.get("name")
    datatype = declared.get("datatype")
    shape = declared.get("shape")
    if not isinstance(name, str) or not name:
        raise bad_request("an input has no name", "inputs")
    if datatype not in DTYPES:
        raise bad_request(f"the input {name!r} has the datatype {datatype!r}; known are {', '.join(DTYPES)}", name)
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise bad_request(f"the input {name!r} needs a shape of non-negative integers", name)
    count = math.prod(shape)
    if blob is not None:
        flat = _from_blob(name, datatype, count, blob)
    elif "data" in declared:
        flat = _from_json(name, datatype, declared["data"])
    else:
        raise bad_request(f"the input {name!r} has neither data nor parameters.binary_data_size", name)
    if flat.size != count:
        raise bad_request(f"the input {name!r} has {flat.size} elements where its shape {shape} asks for {count}", name)
    return Tensor(name, datatype, flat.reshape(shape))


def _flatten(data: object) -> list[Any]:
    if not isinstance(data, list):
        return [data]
    return [leaf for item in data for leaf in (_flatten(item) if isinstance(item, list) else (item,))]


def _from_json(name: str, datatype: str, data: object) -> npt.NDArray[Any]:
    wrong = bad_request(f"the input {name!r} has data that are no {datatype}", name)
    try:
        leaves = _flatten(data)
    except RecursionError:
        raise wrong from None
    if datatype == "BYTES":
        if not all(isinstance(leaf, str) for leaf in leaves):
            raise wrong
        return _objects([leaf.encode() for leaf in leaves])
    wanted: tuple[type, ...] = (bool,) if datatype == "BOOL" else (int,) if "INT" in datatype else (int, float)
    if not all(type(leaf) in wanted for leaf in leaves):
        raise wrong
    try:
        return np.array(leaves, dtype=DTYPES[datatype])
    except OverflowError:
        raise wrong from None


def _from_blob(name: str, datatype: str, count: int, blob: bytes) -> npt.NDArray[Any]:
    if datatype == "BYTES":
        return _objects(_split(name, count, blob))
    dtype = DTYPES[datatype]
    if len(blob) != count * dtype.itemsize:
        raise bad_request(
            f"the input {name!r} has {len(blob)} bytes where {count} of {datatype} take {count * dtype.itemsize}", name
        )
    return np.frombuffer(blob, dtype)


def _split(name: str, count: int, blob: bytes) -> list[bytes]:
    items: list[bytes] = []
    position = 0
    while position < len(blob):
        start = position + 4
        length = struct.unpack_from("<I", blob, position)[0] if start <= len(blob) else math.inf
        if start + length > len(blob) or len(items) == count:
            raise bad_request(f"the input {name!r} has BYTES data that do not fit their lengths", name)
        position = start + int(length)
        items.append(blob[start:position])
    return items


def _objects(items: Sequence[bytes]) -> npt.NDArray[np.object_]:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def to_json(tensor: Tensor) -> list[Any]:
    """The flat, row-major data of a tensor; BYTES as text (invalid UTF-8 is replaced)."""
    flat = tensor.data.ravel().tolist()
    return [item.decode("utf-8", "replace") for item in flat] if tensor.datatype == "BYTES" else flat


def to_blob(tensor: Tensor) -> bytes:
    """The binary data of a tensor."""
    if tensor.datatype == "BYTES":
        return b"".join(struct.pack("<I", len(item)) + item for item in tensor.data.ravel())
    return np.ascontiguousarray(tensor.data, DTYPES[tensor.datatype]).tobytes()
