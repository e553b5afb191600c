"""Reading bytes by address in compiled code: single instructions that numba has no name for.

They do not check bounds; only the scanner uses them, behind its own checks. On a machine with the other byte order
`first_byte` would count from the wrong end; numba runs on none.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from streaming.compile_kernels import kernel
from streaming.records import Bytes


@kernel
def address(buffer: Bytes) -> int:
    """The address of the first byte of an array."""
    return int(np.int64(buffer.ctypes.data))


def _load_byte(context: Any, i: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        return builder.zext(builder.load(pointer), ir.IntType(64))

    return types.int64(types.int64), generate


def _load_word(context: Any, i: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load(pointer, align=1)

    return types.uint64(types.int64), generate


def _count_zero_bytes(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zeros = builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))
        return builder.lshr(zeros, ir.Constant(ir.IntType(64), 3))

    return types.int64(types.uint64), generate


#: The byte at an address.
byte = cast(Callable[[int], int], intrinsic(_load_byte))
#: The 8 bytes at an address, the first one lowest.
word = cast(Callable[[int], np.uint64], intrinsic(_load_word))
#: The number (0 to 7) of the lowest byte that is not zero of a word that is not zero.
first_byte = cast(Callable[[np.uint64], int], intrinsic(_count_zero_bytes))
