"""What differs between two declarations is said in words, and nothing that differs is left out."""

from dataclasses import replace

import pytest

from streaming.changes import changes
from streaming.deriving.derivation import Derivation, Input, Table
from streaming.plan import Aggregate, Column, Model, Plan

MINUTE_US = 60_000_000
COUNT = Aggregate("edits", "added", "count", 10 * MINUTE_US, MINUTE_US)
MEAN = Aggregate("mean", "added", "mean", 60 * MINUTE_US, MINUTE_US)
ADDED, SIZE = Column("added", "bigint", nullable=True), Column("size", "double", nullable=True)
PLAN = Plan("activity", "edits", "", "user", "string", "time", (ADDED,), (COUNT, MEAN), 5 * MINUTE_US)
DRIFT = Model("drift", "adwin", ("added",), 2, (("delta", 0.002),))

LEFT = Input("orders", "orders", "broker", "time bigint, item string", "time", 0)
RIGHT = Input("prices", "prices", "broker", "time bigint, item string", "time", 0)
JOINED = Derivation("priced", "as_of_join", (LEFT, RIGHT), "item", "time bigint", 0, on="item")
LOOKED_UP = Derivation(
    "named", "table_lookup", (LEFT,), "item", "time bigint", 0, table=Table("items", "items.parquet", "since", "x int")
)


def said(before, **changed) -> str:
    return "; ".join(changes(before.essence, replace(before, **changed).essence))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"aggregates": (COUNT,)}, "aggregation mean of 'added' over 1h every 1m was removed"),
        (
            {"aggregates": (COUNT, replace(MEAN, window_us=3_660_000_000))},
            "aggregation mean of 'added' over 1h every 1m became mean of 'added' over 61m every 1m",
        ),
        (
            {"aggregates": (replace(COUNT, slide_us=30_000_000), MEAN)},
            "aggregation count of 'added' over 10m every 1m became count of 'added' over 10m every 30s",
        ),
        ({"aggregates": (MEAN, COUNT)}, "the order or number of its aggregations was changed"),
        (
            {"aggregates": (COUNT, MEAN, Aggregate("s", "size", "sum", kind="lifetime")), "columns": (ADDED, SIZE)},
            "aggregation sum of 'size' over all events was added",
        ),
        (
            {"aggregates": (COUNT, replace(MEAN, kind="session", slide_us=0))},
            "aggregation mean of 'added' over 1h every 1m became mean of 'added' over sessions with gaps of 1h",
        ),
        ({"columns": (replace(ADDED, nullable=False),)}, "field 'added' bigint became 'added' bigint not null"),
        (
            {"columns": (Column("added", "int", nullable=True),), "delay_us": 0},
            "watermark delay 5m became 0s; field 'added' bigint became 'added' int",
        ),
        ({"delay_us": 0}, "watermark delay 5m became 0s"),
        ({"lateness_us": 86_400_000_000}, "allowed lateness 0s became 1d"),
        ({"emission": "final", "clocks": "key"}, "emission 'fresh' became 'final'; clocks of 'partition' became 'key'"),
        ({"topic": "others"}, "topic 'edits' became 'others'"),
        ({"transformation_text": "def big(batch): ..."}, "the transformation or filter was changed"),
        ({"source": (ADDED,)}, "field 'added' bigint was added"),
        (
            {"models": (DRIFT,), "columns": (ADDED, Column("drift", "double", nullable=True))},
            "model 'drift' adwin(added; delta=0.002) every 2 was added",
        ),
    ],
)
def test_what_differs_between_plans(changed, words):
    assert said(PLAN, **changed) == words


def test_fields_in_another_order_are_said_to_be_so():
    before = replace(PLAN, columns=(ADDED, SIZE))
    assert said(before, columns=(SIZE, ADDED)) == "the order of its fields was changed"


@pytest.mark.parametrize(
    ("derivation", "changed", "words"),
    [
        (JOINED, {"key": "time"}, "key 'item' became 'time'"),
        (JOINED, {"tolerance_us": 90_000_000}, "tolerance none became 90s"),
        (JOINED, {"inputs": (LEFT, replace(RIGHT, delay_us=1_000))}, "right input: watermark delay 0s became 1ms"),
        (LOOKED_UP, {"table": replace(LOOKED_UP.table, path="x")}, "table: path 'items.parquet' became 'x'"),
        (LOOKED_UP, {"features": (("a", "view:a"),)}, "feature a from view:a was added"),
    ],
)
def test_what_differs_between_derivations(derivation, changed, words):
    assert said(derivation, **changed) == words


def test_what_changes_no_state_is_no_difference():
    renamed = tuple(replace(each, name=f"{each.name}_new") for each in PLAN.aggregates)
    assert said(PLAN, aggregates=renamed, bootstrap_servers="elsewhere", changelog="topic", future_us=1) == ""
    assert said(JOINED, schema="other", delay_us=9, drift_us=9) == ""


@pytest.mark.parametrize("one", [PLAN, JOINED, LOOKED_UP])
def test_no_difference_is_left_out(one):
    essence = one.essence
    for name, value in essence.items():
        other = essence | {name: [*value, *value] if isinstance(value, list) and value else "other"}
        if isinstance(value, list) and not value:
            continue
        if name == "inputs":
            other[name] = [each | {"topic": "other"} for each in value]
        if name == "table":
            other[name] = {"path": "other"}
        assert changes(essence, other), name
