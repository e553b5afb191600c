"""Decimal numbers as the nearest double, without a library call: two multiplications for nearly all of them.

Algorithm of Eisel and Lemire: Lemire, "Number parsing at a gigabyte per second" (2021), with the table of fast_float.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from streaming.compile_kernels import kernel

#: Digits of a mantissa that fit 64 bits whatever they are.
MAX_DIGITS = 19

_LOWEST, _HIGHEST = -342, 308
_MANTISSA_BITS, _EXPONENT_BIAS, _INFINITE = 52, 1023, 2047
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_ONE, _THREE = np.uint64(1), np.uint64(3)
_EXTRA = np.uint64(64 - _MANTISSA_BITS - 3)
_UNCERTAIN = np.uint64((1 << 64 - _MANTISSA_BITS - 3) - 1)
_HIDDEN = np.uint64(1 << _MANTISSA_BITS)
_FRACTION = np.uint64(_MANTISSA_BITS)
_TOP = np.uint64(63)


def powers_of_five() -> npt.NDArray[np.uint64]:
    """[Q, 2] high and low half of the 128 leading bits of 5^q, for q from -342; rounded up where q is negative."""
    found = []
    for q in range(_LOWEST, _HIGHEST + 1):
        power = 5 ** abs(q)
        if q < 0:
            bits = (power - 1).bit_length()
            power = (1 << bits + 127 if q >= -27 else 1 << 2 * bits + 128) // power + 1
        shift = power.bit_length() - 128
        power = power >> shift if shift > 0 else power << -shift
        found.append((power >> 64, power & 0xFFFFFFFFFFFFFFFF))
    return np.array(found, dtype=np.uint64)


def _high_product(context: Any, a: Any, b: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(argument, wide) for argument in arguments))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


def _leading_zeros(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


def _as_double(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.uint64), generate


_high = cast(Callable[[np.uint64, np.uint64], np.uint64], intrinsic(_high_product))
_zeros = cast(Callable[[np.uint64], np.uint64], intrinsic(_leading_zeros))
_double = cast(Callable[[np.uint64], float], intrinsic(_as_double))
_POWERS = powers_of_five()


@kernel
def nearest(mantissa: int, digits: int, exponent: int) -> float:
    """The double nearest to a decimal number that is not zero, ties to even; NaN where only exact arithmetic can tell.

    Args:
        mantissa: Its first 19 significant digits as the bits of a uint64.
        digits: How many it has.
        exponent: It is `mantissa` (with all its digits) times 10^exponent; infinity where that is out of range.
    """
    if digits <= MAX_DIGITS:
        return _nearest(np.uint64(mantissa), exponent)
    exponent += digits - MAX_DIGITS
    below = _nearest(np.uint64(mantissa), exponent)
    return below if below == _nearest(np.uint64(mantissa) + _ONE, exponent) else np.nan


@kernel
def _nearest(mantissa: np.uint64, exponent: int) -> float:
    if exponent < _LOWEST:
        return 0.0
    if exponent > _HIGHEST:
        return np.inf
    shift = _zeros(mantissa)
    mantissa <<= shift
    high, low = _product(mantissa, exponent)
    if low == _ALL and not -27 <= exponent <= 55:
        return np.nan
    carried = high >> _TOP
    bits = high >> (carried + _EXTRA)
    binary = ((217_706 * exponent) >> 16) + 63 + np.int64(carried) - np.int64(shift) + _EXPONENT_BIAS
    if binary <= 0:
        if binary <= -63:
            return 0.0
        bits >>= np.uint64(1 - binary)
        return _double((bits + (bits & _ONE)) >> _ONE)
    if low <= _ONE and -4 <= exponent <= 23 and bits & _THREE == _ONE and bits << (carried + _EXTRA) == high:
        bits -= _ONE  # exactly half-way, to even
    bits = (bits + (bits & _ONE)) >> _ONE
    if bits >= _HIDDEN << _ONE:
        bits, binary = _HIDDEN, binary + 1
    if binary >= _INFINITE:
        return np.inf
    return _double(bits - _HIDDEN | np.uint64(binary) << _FRACTION)


@kernel
def _product(mantissa: np.uint64, exponent: int) -> tuple[np.uint64, np.uint64]:
    """The 128 leading bits of a mantissa times 5^exponent, exact enough to round the first 55."""
    high, low = _high(mantissa, _POWERS[exponent - _LOWEST, 0]), mantissa * _POWERS[exponent - _LOWEST, 0]
    if high & _UNCERTAIN == _UNCERTAIN:
        more = _high(mantissa, _POWERS[exponent - _LOWEST, 1])
        low += more
        if more > low:
            high += _ONE
    return high, low
