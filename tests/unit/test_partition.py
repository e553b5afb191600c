"""A partition against a brute-force oracle that keeps every event and computes each window from the definition."""

import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.partition import Counters, Partition, StateError
from streaming.plan import Aggregate, Column, Plan
from streaming.records import Emission, RecordBatch, Reject

NOW_MS = 1_000_000
FUTURE_MS = 60
COLUMNS = (Column("x", "double", nullable=True), Column("y", "bigint", nullable=True))
WINDOWS_MS = ((50, 10), (20, 10), (30, 30), (75, 25))
AGGREGATES = tuple(
    Aggregate(f"{function}_{column}_{window}_{slide}", column, function, window * 1000, slide * 1000)
    for window, slide in WINDOWS_MS
    for column, function in (("x", "sum"), ("x", "mean"), ("y", "count"), ("y", "sum"))
    if (column, slide) != ("y", 25)
)


def plan(aggregates: tuple[Aggregate, ...] = AGGREGATES, delay_ms: int = 15, entity_type: Any = "string") -> Plan:
    return Plan(
        "view", "topic", "", "user", entity_type, "time", COLUMNS, aggregates, delay_ms * 1000, FUTURE_MS * 1000
    )


def event(user: Any, time_ms: int, x: float | None = 1.0, y: int | None = 1) -> bytes:
    return json.dumps({"user": user, "time": time_ms, "x": x, "y": y}).encode()


def batch(values: Sequence[bytes], first: int = 0, partition: int = 0) -> RecordBatch:
    ends = np.cumsum([0, *map(len, values)], dtype=np.int64)
    count = len(values)
    return RecordBatch(
        partition,
        np.frombuffer(b"".join(values), dtype=np.uint8),
        np.arange(first, first + count, dtype=np.int64),
        np.full((count, 2), -1, dtype=np.int64),
        np.stack([ends[:-1], ends[1:]], axis=1),
        np.zeros(count, dtype=np.int64),
    )


def rows(emission: Emission) -> dict[Any, tuple[Any, ...]]:
    """Entity to its features, floats as their bits."""
    entities = emission.entities.to_pylist()
    assert len(set(entities)) == len(entities) == len(emission.event_time_us) == emission.features.num_rows
    features = zip(*(column.to_pylist() for column in emission.features.columns), strict=True)
    return {entity: tuple(map(bits, row)) for entity, row in zip(entities, features, strict=True)}


def bits(value: Any) -> Any:
    return struct.pack("<d", value) if isinstance(value, float) else value


class Oracle:
    """The definition of DESIGN.md, one event at a time; times in milliseconds."""

    def __init__(self, what: Plan) -> None:
        self.plan = what
        self.clock: int | None = None
        self.idle_from = (0, 0)
        self.emitted_at: int | None = None
        self.events: list[tuple[str, int, dict[str, Any], set[int]]] = []
        self.touched: set[str] = set()
        self.rejects: list[tuple[str, int]] = []

    def add(self, offset: int, value: bytes, now: int) -> None:
        fields = json.loads(value)
        time = fields["time"]
        if time > now + FUTURE_MS:
            self.rejects.append(("dead", offset))
            return
        self.clock = time if self.clock is None else max(self.clock, time)
        self.idle_from = (self.clock, now)
        watermark = self.clock - self.plan.delay_us // 1000
        slides = {aggregate.slide_us // 1000 for aggregate in self.plan.aggregates}
        open_slides = {slide for slide in slides if time // slide * slide + slide > watermark}
        if not open_slides:
            self.rejects.append(("late", offset))
            return
        self.events.append((fields["user"], time, fields, open_slides))
        self.touched.add(fields["user"])

    def tick(self, now: int) -> None:
        if self.clock is not None:
            self.clock = max(self.clock, self.idle_from[0] + now - self.idle_from[1])

    def window(self, user: str, aggregate: Aggregate, clock: int) -> list[tuple[int, int, Any]]:
        """(pane, index of the event, value) of what the fresh window at a clock holds."""
        slide = aggregate.slide_us // 1000
        end = clock // slide * slide + slide
        return [
            (time // slide, index, fields[aggregate.column])
            for index, (who, time, fields, open_slides) in enumerate(self.events)
            if who == user and end - aggregate.window_us // 1000 <= time < end
            if slide in open_slides and fields[aggregate.column] is not None
        ]

    def value(self, user: str, aggregate: Aggregate) -> Any:
        assert self.clock is not None
        held = self.window(user, aggregate, self.clock)
        total = 0.0
        for pane in sorted({pane for pane, _, _ in held}):
            partial = 0.0
            for _, _, value in (entry for entry in held if entry[0] == pane):
                partial += value
            total += partial
        if aggregate.function == "count":
            return len(held)
        return total if aggregate.function == "sum" else total / len(held) if held else None

    def emit(self) -> dict[str, tuple[Any, ...]]:
        changed = set(self.touched)
        if self.emitted_at is not None and self.clock is not None:
            for user in {user for user, *_ in self.events}:
                for aggregate in self.plan.aggregates:
                    before = {index for _, index, _ in self.window(user, aggregate, self.emitted_at)}
                    after = {index for _, index, _ in self.window(user, aggregate, self.clock)}
                    if user not in self.touched and before - after:
                        changed.add(user)
        self.touched.clear()
        self.emitted_at = self.clock
        return {user: tuple(bits(self.value(user, a)) for a in self.plan.aggregates) for user in changed}


VALUES = st.none() | st.sampled_from([0.1, 0.2, 0.3, 1e16, -1e16, 1.0, 3.3, -0.0, 1e-9])
COUNTS = st.none() | st.integers(-3, 3)


@st.composite
def histories(draw) -> list[tuple[str, Any]]:
    """Events that mostly move on, some out of order, late or from the future, between emissions, ticks and restarts."""
    steps: list[tuple[str, Any]] = []
    time, now = NOW_MS - 400, NOW_MS
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["events", "events", "events", "tick", "emit", "restart"]))
        if kind == "events":
            values = []
            for _ in range(draw(st.integers(1, 6))):
                time += draw(st.sampled_from([0, 1, 3, 8, 30, 90]))
                at = time + draw(st.sampled_from([0, 0, 0, -5, -14, -16, -30, -80, 100_000]))
                values.append(event(draw(st.sampled_from("abc")), at, draw(VALUES), draw(COUNTS)))
            now += 1
            steps.append((kind, (values, now)))
        else:
            now += draw(st.sampled_from([0, 7, 10, 40])) if kind == "tick" else 0
            steps.append((kind, now))
    return [*steps, ("emit", now)]


@settings(max_examples=250, deadline=None)
@given(histories(), st.sampled_from([0, 15, 60]))
def test_equals_the_definition_at_every_step(steps, delay_ms):
    what = plan(delay_ms=delay_ms)
    partition, oracle = Partition(what, 0), Oracle(what)
    rejects: list[Reject] = []
    offset = 0
    for kind, argument in steps:
        if kind == "events":
            values, now = argument
            rejects += partition.process(batch(values, offset), now * 1000)
            for value in values:
                oracle.add(offset, value, now)
                offset += 1
        elif kind == "tick":
            partition.tick(argument * 1000)
            oracle.tick(argument)
        elif kind == "restart":
            data = partition.snapshot()
            partition = Partition.restore(what, 0, data)
            assert partition.snapshot() == data
        else:
            emission = partition.emit()
            assert rows(emission) == oracle.emit()
            assert set(emission.event_time_us.tolist()) <= {partition.clock_us}
        assert partition.next_offset == offset
        if oracle.clock is not None:
            assert partition.clock_us == oracle.clock * 1000
            assert partition.watermark_us == partition.clock_us - what.delay_us
    assert [(reject.kind, reject.offset) for reject in rejects] == oracle.rejects
    dead = sum(kind == "dead" for kind, _ in oracle.rejects)
    users = {user for user, *_ in oracle.events}
    assert partition.counters == Counters(offset, dead, len(rejects) - dead, len(users))


LASTING = (
    Aggregate("sum_x_lifetime", "x", "sum", kind="lifetime"),
    Aggregate("mean_x_last", "x", "mean", kind="last", size=3),
)
FORGETFUL = replace(plan((*AGGREGATES, *LASTING)), idle_ttl_us=40_000)


@settings(max_examples=250, deadline=None)
@given(histories(), st.sampled_from([plan(), FORGETFUL, replace(FORGETFUL, clocks="key")]), st.data())
def test_any_split_into_batches_and_any_restart_gives_the_same_bits(steps, what, data):
    whole, parts = Partition(what, 0), Partition(what, 0)
    offset = 0
    for kind, argument in steps:
        if kind == "events":
            values, now = argument
            refused = whole.process(batch(values, offset), now * 1000)
            cut = data.draw(st.integers(0, len(values)))
            again = parts.process(batch(values[:cut], offset), now * 1000)
            parts = Partition.restore(what, 0, parts.snapshot())
            again += parts.process(batch(values, offset), now * 1000)  # what is read twice is taken once
            assert refused == again
            offset += len(values)
        elif kind == "tick":
            whole.tick(argument * 1000)
            parts.tick(argument * 1000)
        elif kind == "emit":
            assert rows(whole.emit()) == rows(parts.emit())
        assert whole.snapshot() == parts.snapshot()


def test_a_silent_entity_falls_pane_by_pane_and_only_then_is_emitted():
    aggregates = (
        Aggregate("count_y", "y", "count", window_us=30_000, slide_us=10_000),
        Aggregate("mean_y", "y", "mean", window_us=30_000, slide_us=10_000),
    )
    partition = Partition(plan(aggregates), 0)
    assert rows(partition.emit()) == {}
    partition.process(batch([event("a", 1_000, y=2), event("a", 1_010, y=4), event("b", 1_015)]), 1_020_000)
    assert rows(partition.emit()) == {"a": (2, bits(3.0)), "b": (1, bits(1.0))}
    assert rows(partition.emit()) == {}
    partition.process(batch([event("b", 1_029)], 3), 1_029_000)
    assert rows(partition.emit()) == {"b": (2, bits(1.0))}
    partition.process(batch([event("b", 1_030)], 4), 1_030_000)
    assert rows(partition.emit()) == {"a": (1, bits(4.0)), "b": (3, bits(1.0))}
    partition.tick(1_039_999)
    assert rows(partition.emit()) == {}
    partition.tick(1_040_000)
    assert rows(partition.emit()) == {"a": (0, None), "b": (2, bits(1.0))}
    partition.tick(2_000_000)
    assert rows(partition.emit()) == {"b": (0, None)}
    partition.tick(3_000_000)
    assert rows(partition.emit()) == {}


def test_replayed_history_stays_in_its_own_time_while_the_wall_clock_runs():
    partition = Partition(plan(), 0)
    partition.tick(NOW_MS * 1000)
    assert rows(partition.emit()) == {}
    partition.process(batch([event("a", 5)]), NOW_MS * 1000)
    partition.tick(NOW_MS * 1000 + 7_000)
    assert partition.clock_us == 12_000
    partition.process(batch([event("a", 6)], 1), NOW_MS * 1000 + 9_000)
    assert partition.clock_us == 12_000
    partition.tick(NOW_MS * 1000 + 10_000)
    assert partition.clock_us == 13_000


def test_an_event_from_the_future_is_dead_and_moves_nothing():
    partition = Partition(plan(), 0)
    partition.process(batch([event("a", 1_000)]), 1_000_000)
    (reject,) = partition.process(batch([event("a", 1_061)], 1), 1_000_000)
    assert reject.kind == "dead"
    assert reject.reason == (
        "event time 1970-01-01T00:00:01.061000Z is from the future: the clock says 1970-01-01T00:00:01.000000Z"
    )
    assert partition.clock_us == 1_000_000
    assert partition.process(batch([event("a", 1_060)], 2), 1_000_000) == []


def test_poison_records_do_not_hold_up_the_rest():
    partition = Partition(plan(), 0)
    rejects = partition.process(batch([b"{", event("a", 1), b"", event("b", 2), event(3, 2)]), 1_000)
    assert [reject.offset for reject in rejects] == [0, 2, 4]
    assert sorted(rows(partition.emit())) == ["a", "b"]
    assert partition.counters == Counters(processed=5, dead=3, late=0, keys=2)


def test_many_entities_of_either_type():
    names = [f"user-{number}" for number in range(3000)]
    numbers = [7 * number - 9000 for number in range(3000)]
    for entity_type, users in (("string", names), ("int64", numbers)):
        partition = Partition(plan(entity_type=entity_type), 0)
        for first in (0, 1000, 2000):
            partition.process(batch([event(user, 1) for user in users[first : first + 1000]], first), 1_000)
        emission = partition.emit()
        assert emission.entities.to_pylist() == users
        restored = Partition.restore(plan(entity_type=entity_type), 0, partition.snapshot())
        restored.process(batch([event(user, 2) for user in users[::-2]], 3000), 1_000)
        assert restored.counters.keys == 3000
        assert restored.emit().entities.to_pylist() == users[1::2]


def test_partitions_share_nothing():
    one, other = Partition(plan(), 0), Partition(plan(), 1)
    one.process(batch([event("a", 1, x=5.0)]), 1_000)
    other.process(batch([event("a", 1, x=2.0)], partition=1), 1_000)
    assert one.emit().features["sum_x_50_10"].to_pylist() == [5.0]
    assert other.emit().features["sum_x_50_10"].to_pylist() == [2.0]


def test_restore_refuses_what_does_not_belong_to_it():
    partition = Partition(plan(), 0)
    partition.process(batch([event("a", 1)]), 1_000)
    data = partition.snapshot()
    with pytest.raises(StateError, match="another declaration"):
        Partition.restore(plan(delay_ms=1), 0, data)
    with pytest.raises(StateError, match="partition 0"):
        Partition.restore(plan(), 1, data)
    with pytest.raises(StateError, match="version"):
        Partition.restore(plan(), 0, b"something else")
    with pytest.raises(StateError, match="cut short"):
        Partition.restore(plan(), 0, data[:-1])


def test_final_windows_equal_those_of_feast_tiling():
    from datetime import timedelta

    from feast.aggregation import Aggregation
    from feast.aggregation.tiling.orchestrator import apply_sawtooth_window_tiling
    from feast.aggregation.tiling.tile_subtraction import convert_cumulative_to_windowed

    window, hop = timedelta(milliseconds=50), timedelta(milliseconds=10)
    aggregates = (
        Aggregate("sum_y", "y", "sum", window_us=50_000, slide_us=10_000),
        Aggregate("count_y", "y", "count", window_us=50_000, slide_us=10_000),
    )
    random = np.random.default_rng(5)
    times = np.sort(random.integers(0, 300, size=80))
    users = random.choice(list("abc"), size=80)
    amounts = random.integers(-9, 9, size=80)
    frame = pd.DataFrame({"user": users, "time": pd.to_datetime(times, unit="ms"), "y": amounts})
    declared = [Aggregation(column="y", function=function, name=f"{function}_y") for function in ("sum", "count")]
    tiles = apply_sawtooth_window_tiling(frame, declared, ["user"], "time", window, hop)
    expected = convert_cumulative_to_windowed(tiles, ["user"], "end", window, declared)
    partition = Partition(plan(aggregates), 0)
    offset = 0
    held: dict[str, tuple[float, int]] = dict.fromkeys("abc", (0.0, 0))
    for end in range(10, 310, 10):
        chosen = (times >= end - 10) & (times < end)
        chosen_events = zip(users[chosen], times[chosen].tolist(), amounts[chosen].tolist(), strict=True)
        values = [event(user, time, y=amount) for user, time, amount in chosen_events]
        partition.process(batch([*values, event("nobody", end - 1)], offset), 1_000_000)
        offset = partition.next_offset
        emission = partition.emit()
        features = zip(*(column.to_pylist() for column in emission.features.columns), strict=True)
        held.update(zip(emission.entities.to_pylist(), features, strict=True))
        for _, row in expected[expected["end"] == pd.Timestamp(end, unit="ms")].iterrows():
            assert held[row["user"]] == (row["sum_y"], row["count_y"])
    assert len(expected) > 60


def test_pieces_end_where_the_clock_enters_another_pane_so_every_pane_can_be_logged():
    partition = Partition(plan(delay_ms=0), 0)
    slide = min(aggregate.slide_us for aggregate in partition.plan.aggregates) // 1000
    events = [event("a", 1), event("b", 2), event("a", slide + 1), b"{", event("b", 5 * slide), event("a", 5 * slide)]
    logged = []
    for rejects in partition.pieces(batch(events), 10 * slide * 1000):
        emission = partition.emit()
        logged.append((partition.next_offset, [one.offset for one in rejects], emission.event_time_us.max() // 1000))
    assert logged == [(2, [], 2), (4, [3], slide + 1), (6, [], 5 * slide)]


def test_panes_are_counted():
    shapes = {
        "sliding": {"window_us": 50_000, "slide_us": 10_000},
        "session": {"window_us": 30_000},
        "last": {"size": 7},
        "lifetime": {},
    }
    for kind, shape in shapes.items():
        what = plan((Aggregate("sum", "x", "sum", kind=kind, **shape),), delay_ms=0)
        partition = Partition(what, 0)
        assert partition.panes == 0
        values = [event("ann", 1_000), event("bob", 1_000), event("bob", 1_015), event("cyd", 1_020)]
        partition.process(batch(values), NOW_MS * 1000)
        assert partition.panes == {"sliding": 4, "session": 3, "last": 4, "lifetime": 3}[kind]
        partition.process(batch([event("cyd", 1_200)], first=4), NOW_MS * 1000)
        partition.emit()  # the pane of cyd that no window can read is given back
        assert partition.panes == {"sliding": 4, "session": 4, "last": 5, "lifetime": 3}[kind]
        assert Partition.restore(what, 0, partition.snapshot()).panes == partition.panes
