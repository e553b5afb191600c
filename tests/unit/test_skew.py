"""Served features against what a worker logged and what the kernel computes again, whatever the worker's batches."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.partition import Partition
from streaming.plan import Aggregate, Column, Plan
from streaming.records import RecordBatch
from streaming.skew import Served, Verdict, judge, logged, read, recomputed

SECOND = 1_000_000
NOW_US = 2_000_000_000 * SECOND
NAMES = ["count_x", "sum_x", "mean_x"]
PLAN = Plan(
    "view",
    "topic",
    "",
    "user",
    "string",
    "time",
    (Column("x", "double", nullable=True),),
    tuple(Aggregate(name, "x", name[:-2], 6 * SECOND, 2 * SECOND) for name in NAMES),  # type: ignore[arg-type]
    SECOND,
)
AT_US = 1_714_521_607 * SECOND


def batch(values: list[dict[str, Any]], first: int) -> RecordBatch:
    data = [json.dumps(value).encode() for value in values]
    ends = np.cumsum([0, *map(len, data)])
    row = np.arange(first, first + len(data))
    spans = np.stack([ends[:-1], ends[1:]], axis=1)
    return RecordBatch(0, np.frombuffer(b"".join(data), np.uint8), row, spans * 0 - 1, spans, row)


def prediction(features: dict[str, float | None], at: dict[str, str | None], entity: str = "a") -> dict[str, Any]:
    return {"id": "7", "entity": entity, "features": features, "features_at": at}


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_what_a_worker_served_is_found_again_whatever_its_batches(data):
    steps = data.draw(st.lists(st.tuples(st.sampled_from("ab"), st.integers(-900, 2_500)), min_size=1, max_size=25))
    values, time_ms = [], 1_714_521_600_000
    for user, step in steps:
        time_ms += step
        values.append({"user": user, "time": time_ms, "x": data.draw(st.sampled_from([None, 0.1, 0.2, 1e16, -1e16]))})
    partition = Partition(PLAN, 0)
    served: list[Served] = []

    def serve() -> None:
        emission = partition.emit()
        rows = zip(*(column.to_pylist() for column in emission.features.columns), strict=True)
        for entity, time_us, row in zip(
            emission.entities.to_pylist(), emission.event_time_us.tolist(), rows, strict=True
        ):
            floats = [float("nan") if value is None else float(value) for value in row]
            second = time_us // SECOND * SECOND
            served.append(Served("p", entity, second, False, dict(zip(NAMES, floats, strict=True))))

    start = 0
    while start < len(values):
        end = start + data.draw(st.integers(1, 6))
        for _ in partition.pieces(batch(values[start:end], start), NOW_US):
            serve()
        start = end
    partition.tick(NOW_US + data.draw(st.integers(0, 9)) * SECOND)
    serve()

    cut = data.draw(st.integers(0, len(values)))
    batches = [batch(values[:cut], 0), batch(values[cut:], cut)]
    wanted = {(each.entity, each.time_us // SECOND) for each in served}
    known = recomputed(PLAN, [each for each in batches if len(each.offsets)], wanted, NOW_US)
    verdict = Verdict()
    judge(served, known, NAMES, verdict)
    assert verdict.matched.total() == 3 * len(served), verdict
    wrong = Verdict()
    judge([each._replace(values={"sum_x": 12.25}) for each in served], known, NAMES, wrong)
    assert wrong.mismatched["sum_x"] == len(served)


def test_served_values_must_be_those_of_one_row():
    log = pa.table(
        {
            "user": ["a", "a", "b"],
            "count_x": [1, 2, 5],
            "sum_x": [0.1, 0.1 + 0.2, 1.0],
            "mean_x": [0.1, None, 1.0],
            "at": pa.array([AT_US, AT_US + 500, AT_US], pa.timestamp("us", "UTC")),
        }
    )
    known = logged(log, "user", "at", NAMES)

    def verdict(features: dict[str, float | None], at: str = "2024-05-01T00:00:07+00:00") -> Verdict:
        found = Verdict()
        served = read(prediction(features, dict.fromkeys(features, at)), "view", NAMES, False, found)
        assert served is not None
        judge([served], known, NAMES, found)
        return found

    assert verdict({"count_x": 2.0, "sum_x": 0.30000000000000004, "mean_x": None}).matched.total() == 3
    crossed = verdict({"count_x": 1.0, "sum_x": 0.30000000000000004})
    assert (crossed.matched.total(), crossed.mismatched.total()) == (1, 1)
    rounded = verdict({"sum_x": 0.3})
    assert rounded.mismatched == {"sum_x": 1}
    assert rounded.examples == [
        "prediction 7 of 'a': sum_x was 0.3, history says 0.1 or 0.30000000000000004",
    ]
    assert verdict({"count_x": 1.0}, "2024-05-01T00:00:07.000500+00:00").mismatched == {"count_x": 1}
    assert verdict({"count_x": 2.0}, "2024-05-01T00:00:07.000500+00:00").matched == {"count_x": 1}
    assert verdict({"count_x": 1.0}, "2024-05-01T00:00:09+00:00").unknown == {"count_x": 1}
    assert verdict({"sum_x": -0.1}).table()[1].split() == ["sum_x", "0", "1", "0", "0"]


def test_a_view_of_which_nothing_was_checked_fails():
    assert Verdict().failure(0, "the log") == ""
    assert Verdict(Counter(x=3), unknown=Counter(x=1), defaulted=Counter(x=1)).failure(4, "the log") == ""
    assert Verdict(unknown=Counter(x=1)).failure(0, "the log") == ""  # given by the request
    nothing = Verdict(unknown=Counter(x=2, y=2)).failure(2, "the log")
    assert nothing == "none of the 2 predictions could be checked, since the log has none of their rows"
    wrong = Verdict(Counter(x=3), Counter(x=1), unknown=Counter(x=1)).failure(5, "the log")
    assert wrong == "1 of 4 served values differ from the log"


def test_defaults_and_features_of_the_request_are_counted_apart():
    verdict = Verdict()
    features = {"count_x": None, "view__sum_x": 1.0, "mean_x": 2.0, "other": 3.0}
    at = {"count_x": None, "view__sum_x": "2024-05-01T00:00:07+00:00", "other": None}
    served = read(prediction(features, at, entity="12"), "view", NAMES, True, verdict)
    assert served == Served("7", 12, AT_US, False, {"sum_x": 1.0})
    assert (verdict.defaulted, verdict.unknown) == ({"count_x": 1}, {"mean_x": 1})
    assert read({"id": "8", "features": {}}, "view", NAMES, False, verdict) is None
