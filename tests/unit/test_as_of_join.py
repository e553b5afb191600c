"""The as-of join against its definition, event by event, and against `pandas.merge_asof`."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.derived import Derived, Operator
from streaming.deriving.as_of_join import AsOfJoin
from streaming.deriving.derivation import Derivation, Input
from streaming.records import RecordBatch
from streaming.state import StateError

NOW_US = 10**12
MS = 1000
LEFT = Input("orders", "orders", "", "item string, at timestamp, n bigint", "at", 0)
RIGHT = Input("prices", "prices", "", "item string, time bigint, price double", "time", 0)


def join(tolerance_ms: int | None = None, delays_ms: tuple[int, int] = (0, 0)) -> Derivation:
    left, right = (replace(each, delay_us=ms * MS) for each, ms in zip((LEFT, RIGHT), delays_ms, strict=True))
    tolerance_us = None if tolerance_ms is None else tolerance_ms * MS
    return Derivation("priced", "as_of_join", (left, right), "item", "", 0, on="item", tolerance_us=tolerance_us)


class Event(NamedTuple):
    """An order by its number, or a price."""

    key: str
    time_ms: int
    number: int

    def value(self, side: int) -> bytes:
        time, number = ("at", "n") if side == 0 else ("time", "price")
        return json.dumps({"item": self.key, time: self.time_ms, number: self.number}).encode()


class Records(NamedTuple):
    """Events of one side that come after each other while the wall clock stands still."""

    side: int
    events: list[Event]
    now_us: int


class Tick(NamedTuple):
    """A tick of the wall clock."""

    now_us: int
    idle: tuple[int, ...]


class Oracle:
    """Keeps all right events for ever; what is late follows from the definition, not from what was forgotten."""

    def __init__(self, what: Derivation) -> None:
        self.what = what
        self.delays = [each.delay_us for each in what.inputs]
        self.clocks: list[float] = [float("-inf"), float("-inf")]
        self.heard: list[tuple[float, int] | None] = [None, None]
        self.rights: list[Event] = []
        self.waiting: list[Event] = []
        self.out: list[tuple[int, int | None]] = []
        self.rejected: list[tuple[int, str, int]] = []

    def mark(self, side: int) -> float:
        return self.clocks[side] - self.delays[side]

    def play(self, step: Records | Tick) -> None:
        if isinstance(step, Tick):
            for side in step.idle:
                if self.heard[side] is None and self.clocks[1 - side] > float("-inf"):
                    self.clocks[side] = self.clocks[1 - side]
                    self.heard[side] = (self.clocks[side], step.now_us)
                last = self.heard[side]
                if last is not None:
                    self.clocks[side] = max(self.clocks[side], last[0] + step.now_us - last[1])
            self.release(self.mark(1))
            return
        for event in step.events:
            self.take(step.side, event, step.now_us)

    def take(self, side: int, event: Event, now_us: int) -> None:
        self.clocks[side] = max(self.clocks[side], event.time_ms * MS)
        self.heard[side] = (self.clocks[side], now_us)
        self.release(self.mark(1))
        if not self.in_time(side, event, min(self.mark(0), self.mark(1))):
            self.rejected.append((side, "late", event.number))
        elif side == 1:
            self.rights.append(event)
        else:
            self.waiting.append(event)
            self.release(self.mark(1))

    def in_time(self, side: int, event: Event, horizon: float) -> bool:
        time, tolerance = event.time_ms * MS, self.what.tolerance_us
        if time >= horizon:
            return True
        before = [each.time_ms * MS for each in self.rights if each.key == event.key and each.time_ms * MS <= horizon]
        newest = max(before, default=None)
        if side == 1:
            return (newest is None or newest <= time) and (tolerance is None or time + tolerance >= horizon)
        if newest is None or (tolerance is not None and newest + tolerance < horizon):
            return tolerance is None
        return newest <= time

    def release(self, mark: float) -> None:
        due = sorted((each.time_ms, at) for at, each in enumerate(self.waiting) if each.time_ms * MS < mark)
        for _, at in due:
            left = self.waiting[at]
            found = [
                (right.time_ms, number, right)
                for number, right in enumerate(self.rights)
                if right.key == left.key and right.time_ms <= left.time_ms
            ]
            best = max(found)[2] if found else None
            if best and self.what.tolerance_us is not None:
                best = best if (left.time_ms - best.time_ms) * MS <= self.what.tolerance_us else None
            self.out.append((left.number, best.number if best else None))
        gone = {at for _, at in due}
        self.waiting = [each for at, each in enumerate(self.waiting) if at not in gone]


class Run:
    """Plays steps on a join, in batches and with snapshots as it is told."""

    def __init__(self, what: Derivation) -> None:
        self.what, self.join = what, AsOfJoin(what)
        self.out: list[tuple[int, int | None]] = []
        self.rejected: list[tuple[int, str, int]] = []
        self.saved: list[bytes] = []

    def play(self, step: Records | Tick, sizes: Sequence[int] = (1_000_000,)) -> None:
        if isinstance(step, Tick):
            for side in step.idle:
                self.add(self.join.tick(step.now_us, side))
            return
        start, turn = 0, 0
        while start < len(step.events):
            values = [event.value(step.side) for event in step.events[start : start + sizes[turn % len(sizes)]]]
            self.add(self.join.process(step.side, RecordBatch.of_values(values, 0), step.now_us))
            start, turn = start + len(values), turn + 1

    def add(self, given: Derived) -> None:
        for key, value in zip(given.keys, given.values, strict=True):
            event = json.loads(value)
            assert key.decode() == event["item"] and event["prices_item"] in (None, event["item"])
            self.out.append((event["n"], event["prices_price"]))
        for side, reject in given.rejects:
            self.rejected.append((side, reject.kind, json.loads(reject.value or b"")[("n", "price")[side]]))

    def save(self) -> None:
        delta = self.join.delta() if self.saved else None
        self.saved = [self.join.snapshot()] if delta is None else [*self.saved, delta]

    def restart(self) -> None:
        self.join = AsOfJoin.restore(self.what, *self.saved)
        self.saved = []


EVENTS = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 60)), min_size=1, max_size=6)


@st.composite
def steps(draw: st.DrawFn) -> list[Records | Tick]:
    """Records of both sides, one after the other, and ticks in between."""
    now_us, number, found = NOW_US, 0, []
    for _ in range(draw(st.integers(1, 8))):
        now_us += draw(st.integers(0, 20)) * MS
        kind = draw(st.sampled_from(["left", "right", "left", "right", "tick"]))
        if kind == "tick":
            found.append(Tick(now_us, draw(st.sampled_from([(0,), (1,), (0, 1)]))))
            continue
        events = [Event(*each, number + at) for at, each in enumerate(draw(EVENTS))]
        number += len(events)
        found.append(Records(int(kind == "right"), events, now_us))
    return found


TOLERANCES = st.none() | st.integers(0, 30)
DELAYS = st.tuples(st.integers(0, 20), st.integers(0, 20))


@settings(max_examples=120, deadline=None)
@given(
    script=steps(),
    tolerance=TOLERANCES,
    delays=DELAYS,
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    restarts=st.sets(st.integers(0, 8)),
)
def test_it_is_its_definition_in_any_batches_and_with_snapshots_anywhere(script, tolerance, delays, sizes, restarts):
    what = join(tolerance, delays)
    oracle, run, whole = Oracle(what), Run(what), Run(what)
    for number, step in enumerate(script):
        oracle.play(step)
        run.play(step, sizes)
        whole.play(step)
        assert run.out == whole.out == oracle.out
        run.save()
        if number in restarts:
            run.restart()
    assert run.rejected == whole.rejected == oracle.rejected
    assert run.join.snapshot() == whole.join.snapshot()
    run.add(run.join.drain())
    oracle.release(float("inf"))
    assert run.out == oracle.out
    assert run.join.drain().values == []


@settings(max_examples=60, deadline=None)
@given(
    lefts=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60)), min_size=1, max_size=30),
    rights=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60)), min_size=1, max_size=30),
    tolerance=TOLERANCES,
    data=st.data(),
)
def test_events_within_the_delay_get_what_merge_asof_gives_whatever_the_order(lefts, rights, tolerance, data):
    run = Run(join(tolerance, (60, 60)))
    order = data.draw(st.permutations([0] * len(lefts) + [1] * len(rights)))
    queues = [iter([Event(*each, n) for n, each in enumerate(side)]) for side in (lefts, rights)]
    for side in order:
        run.play(Records(side, [next(queues[side])], NOW_US))
    run.add(run.join.drain())
    assert not run.rejected
    one = pd.DataFrame(lefts, columns=["item", "t"]).rename_axis("n").reset_index().sort_values("t", kind="stable")
    two = pd.DataFrame(rights, columns=["item", "t"]).rename_axis("p").reset_index().sort_values("t", kind="stable")
    expected = pd.merge_asof(one, two, on="t", by="item", tolerance=tolerance)
    prices = [None if pd.isna(price) else int(price) for price in expected.p]
    assert sorted(run.out) == sorted(zip(expected.n, prices, strict=True))


def test_a_left_event_waits_until_the_right_watermark_has_passed_it():
    run = Run(join(delays_ms=(0, 5)))
    run.play(Records(1, [Event("a", 10, 1)], NOW_US))
    run.play(Records(0, [Event("a", 20, 7)], NOW_US))
    run.play(Records(1, [Event("a", 25, 2)], NOW_US))
    assert run.out == []
    run.play(Records(1, [Event("a", 20, 3), Event("b", 26, 4)], NOW_US))
    assert run.out == [(7, 3)]


def test_an_idle_right_side_goes_on_with_the_wall_clock():
    run = Run(join())
    run.play(Records(1, [Event("a", 10, 1)], NOW_US))
    run.play(Records(0, [Event("a", 20, 7)], NOW_US + 5 * MS))
    run.play(Tick(NOW_US + 500 * MS, (0,)))
    run.play(Tick(NOW_US + 10 * MS, (1,)))
    assert run.out == []
    run.play(Tick(NOW_US + 11 * MS, (1,)))
    assert run.out == [(7, 1)]


def test_a_right_side_without_events_begins_where_the_left_is():
    run = Run(join())
    run.play(Tick(NOW_US, (0, 1)))
    run.play(Records(0, [Event("a", 20, 7)], NOW_US))
    run.play(Tick(NOW_US, (1,)))
    assert run.out == []
    run.play(Tick(NOW_US + MS, (1,)))
    assert run.out == [(7, None)]


def test_a_late_price_is_used_for_the_orders_that_still_wait():
    run = Run(join())
    run.play(Records(1, [Event("a", 10, 1), Event("b", 50, 2)], NOW_US))
    run.play(Records(0, [Event("a", 45, 7), Event("a", 60, 8)], NOW_US))
    run.play(Records(1, [Event("a", 40, 3), Event("b", 61, 4)], NOW_US))
    assert run.out == [(7, 1), (8, 3)]
    assert run.rejected == []


def test_drained_prices_serve_orders_that_come_later():
    run = Run(join())
    run.play(Records(1, [Event("a", 10, 1)], NOW_US))
    run.play(Records(0, [Event("a", 20, 7)], NOW_US))
    run.add(run.join.drain())
    run.play(Records(0, [Event("a", 30, 8)], NOW_US))
    run.add(run.join.drain())
    assert run.out == [(7, 1), (8, 1)]


@pytest.mark.parametrize("tolerance_ms", [None, 500])
def test_memory_holds_the_last_price_of_each_item_and_what_waits(tolerance_ms):
    operator: Operator = AsOfJoin(join(tolerance_ms, (50, 50)))
    sizes, given_ = [], 0
    for first in range(0, 100_000, 4_000):
        times = range(first, first + 4_000)
        rights = [Event(f"item-{at % 100}", at, at).value(1) for at in times]
        lefts = [Event(f"item-{at % 97}", at, at).value(0) for at in times]
        given_ += len(operator.process(0, RecordBatch.of_values(lefts, first), NOW_US).values)
        given_ += len(operator.process(1, RecordBatch.of_values(rights, first), NOW_US).values)
        sizes.append(operator.buffered_bytes)
    assert max(sizes) < 6 << 20
    assert max(sizes[12:]) < 1.5 * max(sizes[:12])
    assert len(operator.snapshot()) < 1 << 16
    assert given_ + len(operator.drain().values) == 100_000


@pytest.mark.parametrize("ahead", [0, 5_000])
def test_an_idle_side_is_not_hurried_by_a_large_state_but_by_what_waits(monkeypatch, ahead):
    monkeypatch.setattr("streaming.deriving.buffered_join.HELD_BYTES", 1 << 18)
    operator = AsOfJoin(join())
    prices = [Event(f"item-{number}", 10, number).value(1) for number in range(5_000)]
    operator.process(1, RecordBatch.of_values(prices, 0), NOW_US)
    orders = [Event("item-1", 20 + number, number).value(0) for number in range(1 + ahead)]
    operator.process(0, RecordBatch.of_values(orders, 0), NOW_US)
    assert operator.buffered_bytes > 1 << 18
    given_ = operator.tick(NOW_US + MS, 1)
    assert operator.clocks_us[1] == (11 if not ahead else 20 + ahead) * MS
    assert len(given_.values) == ahead


def test_a_snapshot_of_another_declaration_is_refused():
    state = AsOfJoin(join()).snapshot()
    with pytest.raises(StateError, match="another declaration"):
        AsOfJoin.restore(join(5), state)
    with pytest.raises(StateError, match="cut short"):
        AsOfJoin.restore(join(), state[:-1])
