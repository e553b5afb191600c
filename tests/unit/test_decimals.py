"""Decimal numbers of any length are read as Python's own float() reads them, nearly all without the plain reader."""

import math
import random
import struct
from decimal import ROUND_DOWN, ROUND_UP, Context
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import streaming.decode
from streaming.decode import Decoder
from streaming.plan import Column, Plan
from streaming.records import RecordBatch

PLAN = Plan("view", "topic", "", "user", "string", "time", (Column("x", "double", nullable=False),), (), delay_us=0)


def read(texts: list[str]) -> tuple[list[bytes | None], int]:
    """The bits of each number, None where it is refused, and how many needed the plain reader."""
    plain, referred = streaming.decode.read_record, []

    def watched(*arguments):
        referred.append(arguments)
        return plain(*arguments)

    values = [b'{"user":"a","time":1,"x":%s}' % text.encode() for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming.decode, "read_record", watched)
        columns, rejects = Decoder(PLAN).decode(RecordBatch.of_values(values, 0))
    for reject in rejects:
        assert "out of the range" in reject.reason
    bits = [struct.pack("<d", value) for value in columns.values[:, 0].tolist()]
    return [one if good else None for one, good in zip(bits, columns.readable, strict=True)], len(referred)


def check(texts: list[str]) -> int:
    found, referred = read(texts)
    expected = [float(int(text)) if text.lstrip("-").isdigit() else float(text) for text in texts]
    assert found == [None if math.isinf(value) else struct.pack("<d", value) for value in expected]
    return referred


def spelled(digits: str, point: int, exponent: int | None, negative: bool) -> str:
    """Some digits as JSON writes them."""
    whole, fraction = digits[:point].lstrip("0") or "0", digits[point:]
    text = ("-" if negative else "") + whole + (f".{fraction}" if fraction else "")
    return text if exponent is None else f"{text}e{exponent}"


DECIMALS = st.builds(
    spelled,
    st.text("0123456789", min_size=1, max_size=25) | st.text("0123456789", min_size=16, max_size=20),
    st.integers(0, 25),
    st.none() | st.integers(-30, 30) | st.integers(-400, 400) | st.integers(-100_000, 100_000),
    st.booleans(),
)
BITS = st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0])
FINITE = BITS.filter(math.isfinite)


@settings(max_examples=300, deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=40))
def test_reads_what_python_writes(values):
    assert check([repr(value) for value in values]) == 0


@settings(max_examples=400, deadline=None)
@given(st.lists(DECIMALS, min_size=1, max_size=40))
@example(["1e400", "-1e309", "1e-400", "1" + 300 * "0", "0.0", "-0.0", "0e99999", "9223372036854775807"])
@example(["0." + 290 * "0" + "1234567890123456789"])
def test_reads_decimals_of_any_length_and_exponent(texts):
    check(texts)


@settings(max_examples=400, deadline=None)
@given(FINITE.filter(lambda value: abs(value) < 1.7e308) | st.floats(2.0**45, 2.0**64), st.integers(17, 40))
@example(2.0**53, 17)
@example(0.0, 19)
@example(5e-324, 30)
@example(2.2250738585072011e-308, 40)
def test_reads_numbers_at_and_around_half_way_between_two_doubles(value, digits):
    middle = (Fraction(value) + Fraction(math.nextafter(value, math.inf))) / 2
    ways = ((800, ROUND_DOWN), (digits, ROUND_DOWN), (digits, ROUND_UP), (19, ROUND_DOWN), (19, ROUND_UP))
    near = [Context(prec=prec, rounding=way).divide(middle.numerator, middle.denominator) for prec, way in ways]
    check([str(one).lower() for one in near] + [f"{one:f}e-4" for one in near if 1e-5 < abs(one) < 1e30])


def test_half_way_goes_to_the_even_neighbour():
    texts = ["9007199254740993", "9007199254740993.0", "9007199254740995.0", "9007199254740992999999999999999e-15"]
    texts += ["9007199254740993e0", "18014398509481990.0", "1.00000000000000011102230246251565404e0"]
    texts += [
        "2.4703282292062327208e-324",
        "2.4703282292062327209e-324",
        "2.2250738585072011e-308",
        "2.225073858507201e-308",
    ]
    texts += [
        "1.7976931348623157e308",
        "1.7976931348623158e308",
        "1.7976931348623159e308",
        "8.5e22",
        "1e23",
        "123456789e15",
    ]
    check(texts)


def test_numbers_of_17_digits_need_no_plain_reader():
    draw = random.Random(0)
    texts = [repr(draw.gauss(0, 1) * 10.0 ** draw.randint(-300, 300)) for _ in range(20_000)]
    texts += [f"{draw.random():.18f}" for _ in range(20_000)]
    assert check(texts) == 0
    longer = [f"{draw.random()}{draw.randint(0, 999_999):06d}" for _ in range(20_000)]
    assert check(longer) < 200
    assert len(np.unique([float(text) for text in texts])) > 39_000
