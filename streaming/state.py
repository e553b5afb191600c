"""State as bytes: a header of JSON and the arrays behind it, whole (a snapshot) or what has changed (a delta)."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

MAGIC = b"millrace state 5\n"


class StateError(ValueError):
    """A snapshot that does not belong to this plan, partition or version of the format, or that is too large."""


def pack(header: dict[str, Any], arrays: Sequence[npt.NDArray[Any]]) -> bytes:
    """Equal headers and arrays give equal bytes."""
    described = header | {"arrays": [[array.dtype.str, list(array.shape)] for array in arrays]}
    contents = (np.ascontiguousarray(array).data for array in arrays)
    return b"".join([MAGIC, json.dumps(described).encode(), b"\n", *contents])


def unpack(data: bytes) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
    """The header and the arrays, which are views of `data`.

    Raises:
        StateError: Not what `pack` made.
    """
    if not data.startswith(MAGIC):
        raise StateError(
            "The state was written by another version of Millrace: go on with that one, or start anew with --reset."
        )
    start = data.find(b"\n", len(MAGIC))
    try:
        header = json.loads(data[len(MAGIC) : start])
        arrays = []
        at = start + 1
        for dtype, shape in header["arrays"]:
            arrays.append(np.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=at).reshape(shape))
            at += arrays[-1].nbytes
    except ValueError:
        raise StateError("The state is cut short: go back to an older checkpoint.") from None
    return header, arrays
