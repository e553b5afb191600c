"""What numba has no name for: cache lines, and instructions for bytes by address, bits of words and floats.

Those that take an address do not check bounds: whoever uses them does. On a machine with the other byte order
`first_byte` would count from the wrong end; numba runs on none.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from streaming.compile_kernels import kernel
from streaming.records import Ints

LINE_BYTES = 64


def lines(rows: int, words: int) -> Ints:
    """Zeros [rows, words] that begin where a line of the cache does.

    Rows of 4 words, or of a multiple, so lie in as few lines as they can.
    """
    memory = np.zeros(rows * words + LINE_BYTES // 8, dtype=np.int64)
    start = -memory.ctypes.data % LINE_BYTES // 8
    return memory[start : start + rows * words].reshape(rows, words)


@kernel
def address(buffer: npt.NDArray[Any]) -> int:
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


def _prefetch(context: Any, i: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer_type, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [pointer_type, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch.p0", fnty=function_type)
        pointer = builder.inttoptr(arguments[0], pointer_type)
        builder.call(function, [pointer, ir.Constant(number, 1), ir.Constant(number, 3), ir.Constant(number, 1)])
        return context.get_dummy_value()

    return types.none(types.int64), generate


def _float_bits(context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.uint64(types.float64), generate


def _leading_zeros(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


def _copy(context: Any, to: Any, start: Any, length: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer_type, flag = ir.IntType(8).as_pointer(), ir.IntType(1)
        function_type = ir.FunctionType(ir.VoidType(), [pointer_type, pointer_type, ir.IntType(64), flag])
        function = builder.module.declare_intrinsic("llvm.memcpy.p0.p0.i64", fnty=function_type)
        pointers = [builder.inttoptr(argument, pointer_type) for argument in arguments[:2]]
        builder.call(function, [*pointers, arguments[2], ir.Constant(flag, 0)])
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), generate


#: The byte at an address.
byte = cast(Callable[[int], int], intrinsic(_load_byte))
#: The 8 bytes at an address, the first one lowest.
word = cast(Callable[[int], np.uint64], intrinsic(_load_word))
#: The number (0 to 7) of the lowest byte that is not zero of a word that is not zero.
first_byte = cast(Callable[[np.uint64], int], intrinsic(_count_zero_bytes))
#: Asks for the memory at an address, which is written soon; any address will do.
prefetch = cast(Callable[[int], None], intrinsic(_prefetch))
#: The 64 bits of a float.
float_bits = cast(Callable[[float], np.uint64], intrinsic(_float_bits))
#: How many of the highest bits of a word are zero, 64 where all are.
leading_zeros = cast(Callable[[np.uint64], int], intrinsic(_leading_zeros))
#: Copies to an address from another so many bytes, which do not overlap.
copy = cast(Callable[[int, int, int], None], intrinsic(_copy))
