"""The in-process face: the bits of the stream, whatever is asked in between, and no value of another entity."""

import json
import struct
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming import window_features
from streaming.partition import Partition
from streaming.plan import Aggregate, Column, Plan
from streaming.records import RecordBatch, Reject
from streaming.window_features import WindowError, WindowFeatures

START = datetime(2024, 5, 1, tzinfo=UTC)
FUNCTIONS = ["count", "sum", "mean"]
SECOND = timedelta(seconds=1)
NOW_US = 1 << 60


def windows() -> WindowFeatures:
    features = WindowFeatures(delay=5 * SECOND, on_reject=lambda _: None)
    features.register_window("recent", "amount", FUNCTIONS, 30 * SECOND, slide=10 * SECOND)
    features.register_window("minute", "amount", FUNCTIONS, 60 * SECOND)
    return features


NAMES = [f"{window}_{function}" for window in ("recent", "minute") for function in FUNCTIONS]
PLAN = Plan(
    "stream",
    "topic",
    "",
    "who",
    "string",
    "at",
    (Column("amount", "double", nullable=True),),
    tuple(
        Aggregate(name, "amount", name.rsplit("_")[1], length * 1_000_000, slide * 1_000_000)  # type: ignore[arg-type]
        for name, (length, slide) in zip(NAMES, [(30, 10)] * 3 + [(60, 60)] * 3, strict=True)
    ),
    5_000_000,
)


def bits(values) -> list:
    return [struct.pack("<d", value) if isinstance(value, float) else value for value in values]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.none() | st.floats(allow_nan=False, allow_infinity=False),
            st.integers(-20_000_000, 30_000_000),
            st.none() | st.integers(-5, 70),
        ),
        max_size=25,
    )
)
def test_bits_are_those_of_the_stream(events):
    features, partition = windows(), Partition(PLAN, 0)
    latest: dict[str, list] = {}
    time = START
    for offset, (entity, amount, step_us, ahead_s) in enumerate(events):
        time += timedelta(microseconds=step_us)
        features.process_event(entity, {"amount": amount, "note": "x"}, time)
        data = json.dumps({"who": entity, "amount": amount, "at": time.isoformat()}).encode()
        span, row = np.array([[0, len(data)]]), np.array([offset])
        partition.process(RecordBatch(0, np.frombuffer(data, np.uint8), row, span - span - 1, span, row), NOW_US)
        if ahead_s is not None:
            at = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=partition.clock_us) + ahead_s * SECOND
            partition.tick(NOW_US + ahead_s * 1_000_000)
        emission = partition.emit()
        rows = zip(*(column.to_pylist() for column in emission.features.columns), strict=True)
        latest.update(zip(emission.entities.to_pylist(), map(list, rows), strict=True))
        if ahead_s is not None:
            features.get_features("another", [], at)
            assert bits(features.get_features(entity, NAMES)) == bits(latest.get(entity, [0, 0.0, None] * 2))
    for entity in "abcd":
        assert bits(features.get_features(entity, NAMES)) == bits(latest.get(entity, [0, 0.0, None] * 2))
    assert features.counters == partition.counters


def test_a_value_falls_when_only_another_entity_moves_the_clock():
    features = windows()
    features.process_event("a", {"amount": 2.0}, START)
    features.process_event("b", {"amount": 5.0}, START + 29 * SECOND)
    assert features.get_features("a", ["recent_sum", "recent_count"]) == [2.0, 1]
    features.process_event("b", {"amount": 5.0}, START + 30 * SECOND)
    assert features.get_features("a", ["recent_sum", "recent_count", "recent_mean"]) == [0.0, 0, None]
    assert features.get_features("a", ["minute_sum"]) == [2.0]
    assert features.get_features("b", ["recent_sum"]) == [10.0]


def test_a_value_falls_when_nothing_happens_at_all():
    features = WindowFeatures()
    features.register_window("recent", "amount", FUNCTIONS, 30 * SECOND, slide=10 * SECOND)
    features.register_window("visit", "amount", ["count"], gap=20 * SECOND)
    features.register_window("ever", "amount", ["count"])
    names = ["recent_count", "recent_mean", "visit_count", "ever_count"]
    assert features.get_features("a", names, at=START + 99 * SECOND) == [0, None, 0, 0]
    features.process_event("a", {"amount": 2.0}, START)
    features.process_event("a", {"amount": 4.0}, START + 15 * SECOND)
    assert features.get_features("a", names, at=START + 29 * SECOND) == [2, 3.0, 2, 2]
    assert features.get_features("a", names, at=START + 30 * SECOND) == [1, 4.0, 2, 2]
    assert features.get_features("a", names, at=START + 35 * SECOND) == [1, 4.0, 0, 2]
    assert features.get_features("a", names, at=START + 40 * SECOND) == [0, None, 0, 2]
    assert features.get_features("a", names, at=START) == features.get_features("a", names) == [0, None, 0, 2]
    features.process_event("a", {"amount": 8.0}, START + 41 * SECOND)
    assert features.get_features("a", names) == [1, 8.0, 1, 3]
    with pytest.raises(WindowError, match="of type datetime, has no zone: give an aware datetime"):
        features.get_features("a", names, at=datetime(2024, 5, 1))  # noqa: DTZ001


def test_numbers_of_numpy_and_decimal_are_their_values():
    features = WindowFeatures()
    features.register_window("real", "amount", ["count", "sum"])
    features.register_window("whole", "pieces", ["count", "sum"], type="bigint")
    features.register_window("yes", "paid", ["count", "sum"], type="boolean")
    features.register_window("name", "shop", ["last"], type="string")
    values = [
        {"amount": np.int64(3), "pieces": np.int64(3), "paid": np.bool_(True), "shop": np.str_("x")},
        {"amount": np.float32(3), "pieces": np.uint8(200)},
        {"amount": np.float64(0.1), "pieces": np.int16(-7), "paid": False},
        {"amount": Decimal("0.2")},
    ]
    for value in values:
        features.process_event("a", value, pd.Timestamp(START))
    assert features.get_features("a", ["real_count", "real_sum"]) == [4, 3.0 + 3.0 + 0.1 + 0.2]
    assert features.get_features("a", ["whole_count", "whole_sum", "yes_count", "yes_sum"]) == [3, 196.0, 2, 1.0]
    assert features.get_features("a", ["name_last"]) == ["x"]


@pytest.mark.parametrize(
    ("entity", "value", "time", "message"),
    [
        (7, 1.0, START, "The entity 7 is of type int: give a string, as str"),
        (None, 1.0, START, "The entity None is of type NoneType: give"),
        ("a", object(), START, "The field 'amount' of an event is of type object: give a number, boolean"),
        ("a", date(2024, 5, 1), START, "is of type date: give"),
        ("a", np.timedelta64(5, "ns"), START, "is of type timedelta64: give"),
        ("a", np.datetime64("2024-05-01", "ns"), START, "is of type datetime64: give"),
        ("a", pd.NA, START, "is of type NAType: give"),
        ("a", 1.0, np.datetime64("2024-05-01"), "2024-05-01 of an event, of type datetime64, has no zone: give"),
        ("a", 1.0, 1_714_521_600, "of an event, of type int, has no zone"),
        ("a", "two", START, "'a' is refused: field 'amount' holds a string where double is declared; correct it, or"),
        ("a", True, START, "holds a boolean where double is declared"),
        ("a", float("nan"), START, "NaN is no JSON number"),
        ("a", np.float32("inf"), START, "Infinity is no JSON number"),
        ("\ud800", 1.0, START, "is refused: field 'entity' holds half a surrogate pair"),
        ("a", 1.0, START - 60 * SECOND, "is late: its windows had closed at watermark 2024-05-01T00:00.*longer delay"),
        ("a", 1.0, START + timedelta(days=2), "is from the future: the clock says 2024-05-02T.*; correct it"),
    ],
)
def test_an_event_that_is_refused_is_an_error_at_once(entity, value, time, message):
    features = WindowFeatures(now=lambda: START + timedelta(days=1))
    features.register_window("n", "amount", ["count"], 10 * SECOND)
    features.process_event("a", {"amount": 1.0}, START)
    with pytest.raises(WindowError, match=message):
        features.process_event(entity, {"amount": value}, time)
    features.process_event("a", {"amount": 1.0}, START)
    assert features.get_features("a", ["n_count"]) == [2]
    assert features.counters.processed == 2 + features.counters.dead + features.counters.late


def test_late_is_what_the_stream_calls_late():
    features = WindowFeatures()
    features.register_window("n", "amount", ["count"], 30 * SECOND, slide=10 * SECOND)
    features.process_event("a", {"amount": 1.0}, START + 19 * SECOND)
    features.process_event("b", {"amount": 1.0}, START + 10 * SECOND)
    with pytest.raises(WindowError, match="is late"):
        features.process_event("b", {"amount": 1.0}, START + 9 * SECOND)
    assert features.get_features("b", ["n_count"], at=START + 30 * SECOND) == [1]
    with pytest.raises(WindowError, match="is late"):
        features.process_event("b", {"amount": 1.0}, START + 29 * SECOND)
    features.process_event("b", {"amount": 1.0}, START + 30 * SECOND)
    assert features.counters == (5, 0, 2, 2)


def test_entities_without_state_take_no_memory():
    features = WindowFeatures()
    features.register_window("n", "amount", ["count", "mean"], 10 * SECOND)
    most = 0
    for number in range(25_000):
        time = START + number * SECOND / 500
        features.process_event(f"card {number}", {"amount": float(number)}, time)
        if number % 1_000 == 0:
            assert features.get_features(f"card {number}", ["n_count"]) == [1]
            most = max(most, features.counters.keys)
    assert most <= 16_000
    assert features.get_features("card 24999", ["n_count", "n_mean"]) == [1, 24_999.0]
    assert features.get_features("card 7", ["n_count", "n_mean"]) == [0, None]
    assert len(features._values) <= 5_000
    features.process_event("card 7", {"amount": 5.0}, START + 120 * SECOND)
    assert features.get_features("card 7", ["n_count", "n_mean"]) == [1, 5.0]


def test_what_changes_nothing_is_told_with_its_reason():
    rejects: list[Reject] = []
    features = WindowFeatures(on_reject=rejects.append, now=lambda: START + timedelta(days=1))
    features.register_window("n", "amount", ["count"], 10 * SECOND)
    for amount, time in ((1.0, START), ("two", START), (True, START), (1.0, START - 60 * SECOND), (1.0, START)):
        features.process_event("a", {"amount": amount}, time)
    assert [reject.kind for reject in rejects] == ["dead", "dead", "late"]
    features.process_event("a", {"amount": float("nan")}, START)
    features.process_event("a", {}, START + timedelta(days=2))
    assert features.get_features("a", ["n_count"]) == [2]
    kinds = [(reject.kind, reject.reason.split(" is ")[0]) for reject in rejects]
    assert [kind for kind, _ in kinds] == ["dead", "dead", "late", "dead", "dead"]
    assert rejects[0].reason == "field 'amount' holds a string where double is declared"
    assert features.counters == (7, 4, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("w", "x", ["median"], SECOND), {}, "there is no function 'median'; take one of count, "),
        (("w", "x", ["sum"], 3 * SECOND), {"slide": 2 * SECOND}, "the slide of 0:00:02 must divide the length of"),
        (("w", "x", ["sum"], SECOND), {"last": 3}, "give one of length, gap and last"),
        (("w", "x", ["sum"]), {"last": 0}, "last is 0, it must be at least 1"),
        (("w", "x", ["sum"]), {"gap": timedelta()}, "the gap is 0:00:00"),
        (("w", "entity", ["sum"], SECOND), {}, "'entity' is kept for the event's own"),
        (("w", "x", ["sum", "sum"], SECOND), {}, "there is a feature 'w_sum' already"),
    ],
)
def test_a_window_that_makes_no_sense_is_refused(arguments, options, message):
    with pytest.raises(WindowError, match=message):
        WindowFeatures().register_window(*arguments, **options)


def test_questions_and_events_that_make_no_sense_are_refused():
    features = windows()
    with pytest.raises(WindowError, match="There is no feature 'recent_max': there are recent_count, "):
        features.get_features("a", ["recent_max"])
    with pytest.raises(WindowError, match="has no zone"):
        features.process_event("a", {}, datetime(2024, 5, 1))  # noqa: DTZ001
    features.process_event("a", {"amount": 1.0}, START)
    with pytest.raises(WindowError, match="comes too late"):
        features.register_window("new", "amount", ["sum"], SECOND)
    assert features.get_features("a", []) == []
    with pytest.raises(WindowError, match="The entity 7 is of type int: give a string"):
        features.get_features(7, ["recent_sum"])
    with pytest.raises(WindowError, match="call register_window first"):
        WindowFeatures().process_event("a", {}, START)


def test_the_example_of_the_documentation_runs():
    text = window_features.__doc__ or ""
    example = "".join(line.strip() + "\n" for line in text.splitlines() if line.startswith("    "))
    code, _, result = example.rpartition("  # ")
    *steps, question = code.strip().splitlines()
    space = {"WindowFeatures": WindowFeatures, "timedelta": timedelta, "datetime": datetime, "UTC": UTC}
    exec("\n".join(steps), space)
    assert eval(question, space) == eval(result) == [12.5, 1]


def test_it_needs_neither_kafka_nor_feast_nor_ray():
    code = "import sys, streaming.window_features; print([m for m in ('kafka', 'feast', 'ray') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
