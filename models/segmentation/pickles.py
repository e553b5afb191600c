"""Reads sparse label volumes that another package pickled, without that package and without running anything.

A pickle is a program. This reader first checks the instructions against a list, and then runs them with stand-ins for
the few names that a `SegmentArray` of `evalseg` needs: plain records, and numpy arrays built here from bytes whose
length is checked. Any other name, and any other instruction, is refused.
"""

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.segmentation.scans import DataError

MAX_BYTES = 512 * 2**20
MAX_VOXELS = 1 << 27
_FOREIGN = {"SegmentArray", "SingleSegment", "MultiClassSegment", "MultiPartSegment"}
_PACKAGES = ("evalseg.", "eval_seg.")
_OPCODES = set(
    """
    PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE SHORT_BINUNICODE
    BINUNICODE8 EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS
    GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD
    """.split()
)
_TYPE_NAMES = {
    "bool",
    "bool_",
    "int",
    "float",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "int32",
    "int64",
    "uint32",
    "uint64",
}


class _Record:
    """Stands for an object of a foreign class; `fields` is its state."""

    fields: dict[str, Any]

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise DataError("a foreign object has no dictionary as its state")
        self.fields = state


class _Dtype:
    """Stands for a numpy dtype: a number type and its order of bytes."""

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or code.lstrip("<>|=")[:1] not in {"b", "i", "u", "f"} or len(code) > 3:
            raise DataError(f"an array of type {code!r} is not allowed")
        self.code = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] == ">":
            self.code = self.code.newbyteorder(">")


class _Array:
    """Stands for a numpy array, which it becomes by its state."""

    def __init__(self) -> None:
        self.values: NDArray[Any] = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.values = _from_bytes(raw, dtype, shape, "F" if fortran else "C")


def load_volume(data: bytes) -> NDArray[np.int64]:
    """The dense labels of a pickled `SegmentArray`.

    Raises:
        DataError: the pickle holds anything that such a volume doesn't need, or is damaged.
    """
    if len(data) > MAX_BYTES:
        raise DataError(f"The pickle has {len(data)} bytes; at most {MAX_BYTES} are read.")
    try:
        _check_instructions(data)
        volume = _Reader(io.BytesIO(data)).load()
        return _dense(volume)
    except DataError as error:
        raise DataError(f"The pickle is refused: {error}.") from None
    except Exception as error:
        raise DataError(f"The pickle is damaged or no sparse volume ({type(error).__name__}).") from None


def _check_instructions(data: bytes) -> None:
    for opcode, argument, position in pickletools.genops(data):
        if opcode.name not in _OPCODES:
            raise DataError(f"instruction {opcode.name} at byte {position} is not allowed")
        if opcode.name in {"PUT", "BINPUT", "LONG_BINPUT"} and int(argument or 0) > len(data):
            raise DataError(f"the memo index at byte {position} is too large")


class _Reader(pickle.Unpickler):
    """Finds the stand-ins and nothing else; they are made anew for every reader, so no pickle can change them."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(_PACKAGES) and name in _FOREIGN:
            return type(name, (_Record,), {})
        if module in {"numpy", "builtins", "__builtin__"} and name in _TYPE_NAMES:
            return name
        if (module, name) in _NAMES:
            return _NAMES[module, name]()
        raise DataError(f"it asks for {module}.{name}, which is not allowed")


def _from_bytes(raw: object, dtype: object, shape: object, order: Any = "C") -> NDArray[Any]:
    if isinstance(raw, str):
        raw = raw.encode("latin-1")
    if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, _Dtype) or not isinstance(shape, tuple):
        raise DataError("an array is built from something else than bytes, a type and a shape")
    values = np.frombuffer(raw, dtype.code)
    if any(not isinstance(side, int) or side < 0 for side in shape) or math.prod(shape) != values.size:
        raise DataError("an array's shape doesn't fit its bytes")
    return values.reshape(shape, order=order)


def _new_array(*_: object) -> _Array:
    return _Array()


def _number(dtype: object, raw: object) -> object:
    return _from_bytes(raw, dtype, ()).item()


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise DataError(f"an encoding {encoding!r} is not allowed")
    return text.encode("latin-1")


def _fresh(function: Callable[..., Any]) -> Callable[[], Any]:
    """A maker of wrappers, so that what a pickle does to a function stays with its own copy."""
    return lambda: lambda *arguments: function(*arguments)


_NAMES: dict[tuple[str, str], Callable[[], Any]] = {
    ("numpy", "ndarray"): lambda: "ndarray",
    ("numpy", "dtype"): lambda: type("dtype", (_Dtype,), {}),
    ("_codecs", "encode"): _fresh(_encoded),
    ("builtins", "slice"): lambda: slice,
    ("__builtin__", "slice"): lambda: slice,
}
for _core in ("numpy.core", "numpy._core"):
    _NAMES[f"{_core}.multiarray", "_reconstruct"] = _fresh(_new_array)
    _NAMES[f"{_core}.multiarray", "scalar"] = _fresh(_number)
    _NAMES[f"{_core}.numeric", "_frombuffer"] = _fresh(_from_bytes)


def _dense(volume: object) -> NDArray[np.int64]:
    fields = _fields(volume)
    shape = tuple(int(side) for side in _plain(fields["shape"]))
    if not 2 <= len(shape) <= 3 or min(shape) < 1 or math.prod(shape) > MAX_VOXELS:
        raise DataError(f"a volume of shape {shape} is not allowed")
    found = np.full(shape, int(fields.get("fill_value", 0)), np.int64)
    for part in fields["segments"] if "segments" in fields else [volume]:
        segment = _fields(part)
        data = _plain(segment["data"])
        if not isinstance(data, np.ndarray):
            raise DataError("a segment's data is no array")
        place = tuple(slice(*one.indices(side)) for one, side in zip(segment["roi"], shape, strict=True))
        if found[place].shape != data.shape:
            raise DataError("a segment doesn't fit its place in the volume")
        found[place] = np.maximum(found[place], data)
    return found


def _fields(record: object) -> dict[str, Any]:
    if not isinstance(record, _Record):
        raise DataError("it holds no sparse volume")
    return record.fields


def _plain(value: Any) -> Any:
    return value.values if isinstance(value, _Array) else value
