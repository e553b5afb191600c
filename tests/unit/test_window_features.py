"""The in-process face: the bits of the stream, whatever is asked in between, and no value of another entity."""

import json
import struct
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import numpy as np
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


def windows() -> WindowFeatures:
    features = WindowFeatures(delay=5 * SECOND)
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
            st.booleans(),
        ),
        max_size=25,
    )
)
def test_bits_are_those_of_the_stream(events):
    features, partition = windows(), Partition(PLAN, 0)
    latest: dict[str, list] = {}
    time = START
    for offset, (entity, amount, step_us, ask) in enumerate(events):
        time += timedelta(microseconds=step_us)
        features.process_event(entity, {"amount": amount, "note": "x"}, time)
        data = json.dumps({"who": entity, "amount": amount, "at": time.isoformat()}).encode()
        span, row = np.array([[0, len(data)]]), np.array([offset])
        partition.process(RecordBatch(0, np.frombuffer(data, np.uint8), row, span - span - 1, span, row), 1 << 60)
        emission = partition.emit()
        rows = zip(*(column.to_pylist() for column in emission.features.columns), strict=True)
        latest.update(zip(emission.entities.to_pylist(), map(list, rows), strict=True))
        if ask:
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


def test_what_changes_nothing_is_told_with_its_reason():
    rejects: list[Reject] = []
    features = WindowFeatures(on_reject=rejects.append, now=lambda: START + timedelta(days=1))
    features.register_window("n", "amount", ["count"], 10 * SECOND)
    for amount, time in ((1.0, START), ("two", START), (object(), START), (1.0, START - 60 * SECOND), (1.0, START)):
        features.process_event("a", {"amount": amount}, time)
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
    assert features.get_features("a", []) == []
    with pytest.raises(WindowError, match="comes too late"):
        features.register_window("new", "amount", ["sum"], SECOND)
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
