"""The interval join against its definition, event by event, and against a merge in pandas."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.derived import Derived, Operator
from streaming.deriving.derivation import Derivation, Input
from streaming.deriving.interval_join import IntervalJoin
from streaming.plan import PlanError
from streaming.records import RecordBatch
from streaming.state import StateError

NOW_US = 10**12
MS = 1000
LEFT = Input("asked", "asked", "", "id string, at timestamp, model string, user string", "at", 0)
RIGHT = Input(
    "labels", "labels", "", "id string, time bigint, label string, w double, more map<string, double>", "time", 0
)
FIELDS = ("id", "time", "label", "w", "more")


def join(earliest_ms: int, latest_ms: int, unmatched: bool = True, delays_ms: tuple[int, int] = (0, 0)) -> Derivation:
    left, right = (replace(each, delay_us=ms * MS) for each, ms in zip((LEFT, RIGHT), delays_ms, strict=True))
    return Derivation(
        "joined",
        "interval_join",
        (left, right),
        "id",
        "",
        0,
        on="id",
        earliest_us=earliest_ms * MS,
        latest_us=latest_ms * MS,
        unmatched=unmatched,
    )


class Event(NamedTuple):
    """An event, and of a right one the texts of its fields as they are written."""

    key: str
    time_ms: int
    value: bytes
    fields: tuple[str, ...] = ()


def left_event(key: str, time_ms: int, start: str = "", end: str = "", more: str = "") -> Event:
    return Event(key, time_ms, f'{start}{{"id":{json.dumps(key)}, "at" : {time_ms}{more}}}{end}'.encode())


def right_event(key: str, time_ms: int, label: str = '"yes"', w: str = "1.50", more: str = "null") -> Event:
    texts = (json.dumps(key), str(time_ms), label, w, more)
    pairs = zip(("id", "time", "l\\u0061bel", "w", "more"), texts, strict=True)
    value = "{" + ",".join(f'"{name}": {text} ' for name, text in pairs) + "}\n"
    return Event(key, time_ms, value.encode(), texts)


def joined(left: Event, right: Event | None) -> bytes:
    texts = ("null",) * 5 if right is None else right.fields
    tail = "".join(f',"labels_{name}":{text}' for name, text in zip(FIELDS, texts, strict=True))
    return left.value[: left.value.rindex(b"}")] + tail.encode() + b"}"


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
    """Keeps every event that was in time for ever, and looks at all of them."""

    def __init__(self, what: Derivation) -> None:
        self.what = what
        self.clocks: list[float] = [float("-inf"), float("-inf")]
        self.heard: list[tuple[float, int] | None] = [None, None]
        self.taken: tuple[list[Event], list[Event]] = ([], [])
        self.matched: set[int] = set()
        self.gone: set[int] = set()
        self.out: list[bytes] = []
        self.rejected: list[tuple[int, str, bytes]] = []

    @property
    def mark(self) -> float:
        return min(clock - each.delay_us for clock, each in zip(self.clocks, self.what.inputs, strict=True))

    def play(self, step: Records | Tick) -> None:
        if isinstance(step, Tick):
            for side in step.idle:
                if self.heard[side] is None and self.clocks[1 - side] > float("-inf"):
                    self.clocks[side] = self.clocks[1 - side]
                    self.heard[side] = (self.clocks[side], step.now_us)
                last = self.heard[side]
                if last is not None:
                    self.clocks[side] = max(self.clocks[side], last[0] + step.now_us - last[1])
            self.release(self.mark)
            return
        for event in step.events:
            self.take(step.side, event, step.now_us)

    def take(self, side: int, event: Event, now_us: int) -> None:
        time = event.time_ms * MS
        if time > now_us + 3_600_000_000:
            self.rejected.append((side, "dead", event.value))
            return
        self.clocks[side] = max(self.clocks[side], time)
        self.heard[side] = (self.clocks[side], now_us)
        self.release(self.mark)
        if time < self.mark - (max(self.what.latest_us, 0) if side == 0 else 0):
            self.rejected.append((side, "late", event.value))
            return
        number = len(self.taken[side])
        self.taken[side].append(event)
        found = []
        for at, other in enumerate(self.taken[1 - side]):
            left, right = (event, other) if side == 0 else (other, event)
            apart = (right.time_ms - left.time_ms) * MS
            if left.key == right.key and self.what.earliest_us <= apart <= self.what.latest_us:
                self.matched.add(number if side == 0 else at)
                found.append((other.time_ms, at, joined(left, right)))
        self.out += [value for _, _, value in sorted(found)]
        self.release(self.mark)

    def release(self, mark: float) -> None:
        if not self.what.unmatched:
            return
        due = [
            (event.time_ms, number, event)
            for number, event in enumerate(self.taken[0])
            if number not in self.gone and event.time_ms * MS + self.what.latest_us < mark
        ]
        for _, number, event in sorted(due):
            self.gone.add(number)
            if number not in self.matched:
                self.out.append(joined(event, None))


class Run:
    """Plays steps on a join, in batches and with snapshots as it is told."""

    def __init__(self, what: Derivation) -> None:
        self.what, self.join = what, IntervalJoin(what)
        self.out: list[bytes] = []
        self.keys: list[bytes] = []
        self.rejected: list[tuple[int, str, bytes]] = []
        self.offsets = [0, 0]
        self.saved: list[bytes] = []

    def play(self, step: Records | Tick, sizes: Sequence[int] = (1_000_000,)) -> None:
        if isinstance(step, Tick):
            for side in step.idle:
                self.add(self.join.tick(step.now_us, side))
            return
        start, turn = 0, 0
        while start < len(step.events):
            values = [event.value for event in step.events[start : start + sizes[turn % len(sizes)]]]
            self.add(self.join.process(step.side, RecordBatch.of_values(values, self.offsets[step.side]), step.now_us))
            self.offsets[step.side] += len(values)
            start, turn = start + len(values), turn + 1

    def add(self, given: Derived) -> None:
        self.keys += given.keys
        self.out += given.values
        self.rejected += [(side, reject.kind, reject.value or b"") for side, reject in given.rejects]

    def save(self) -> None:
        delta = self.join.delta() if self.saved else None
        self.saved = [self.join.snapshot()] if delta is None else [*self.saved, delta]

    def restart(self) -> None:
        self.join = IntervalJoin.restore(self.what, *self.saved)
        self.saved = []


TIMES_MS = st.integers(0, 60)
LEFTS = st.builds(
    left_event,
    st.sampled_from(["a", "b", "é\n"]),
    TIMES_MS,
    start=st.sampled_from(["", " \n"]),
    end=st.sampled_from(["", " ", "\r\n\t "]),
    more=st.sampled_from(["", " ", ', "x": {"y": "}"}', ', "labels_w": 7, "at2": [1]']),
)
RIGHTS = st.builds(
    right_event,
    st.sampled_from(["a", "b", "é\n"]),
    TIMES_MS,
    label=st.sampled_from(['"yes"', "null", '"\\ud83d\\ude00\\n }"']),
    w=st.sampled_from(["1.50", "-0", "null", "1e2"]),
    more=st.sampled_from(["null", '{ "a": [1, "]}"] }', "[" * 70 + '"é"' + "]" * 70, "1" * 400]),
)
IDLE = st.sampled_from([(0,), (1,), (0, 1)])


@st.composite
def steps(draw: st.DrawFn) -> list[Records | Tick]:
    """Records of both sides, one after the other, and ticks in between."""
    now_us, found = NOW_US, []
    for _ in range(draw(st.integers(1, 8))):
        now_us += draw(st.integers(0, 20)) * MS
        kind = draw(st.sampled_from(["left", "right", "left", "right", "tick"]))
        if kind == "tick":
            found.append(Tick(now_us, draw(IDLE)))
        else:
            events = draw(st.lists(LEFTS if kind == "left" else RIGHTS, min_size=1, max_size=6))
            found.append(Records(int(kind == "right"), events, now_us))
    return found


INTERVALS = st.tuples(st.integers(-30, 30), st.integers(0, 30)).map(lambda pair: (pair[0], pair[0] + pair[1]))
DELAYS = st.tuples(st.integers(0, 20), st.integers(0, 20))


@settings(max_examples=150, deadline=None)
@given(
    script=steps(),
    interval=INTERVALS,
    unmatched=st.booleans(),
    delays=DELAYS,
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    restarts=st.sets(st.integers(0, 8)),
)
def test_it_is_its_definition_in_any_batches_and_with_snapshots_anywhere(
    script, interval, unmatched, delays, sizes, restarts
):
    what = join(*interval, unmatched, delays)
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
    assert all(json.loads(value)["id"].encode() == key for key, value in zip(run.keys, run.out, strict=True))
    run.add(run.join.drain())
    oracle.release(float("inf"))
    assert run.out == oracle.out
    assert run.join.drain().values == []


@settings(max_examples=40, deadline=None)
@given(
    lefts=st.lists(st.tuples(st.sampled_from("abc"), TIMES_MS), min_size=1, max_size=30),
    rights=st.lists(st.tuples(st.sampled_from("abc"), TIMES_MS), min_size=1, max_size=30),
    interval=INTERVALS,
    data=st.data(),
)
def test_events_in_time_are_joined_as_pandas_would_whatever_the_order(lefts, rights, interval, data):
    what = join(*interval, delays_ms=(60, 60))
    run = Run(what)
    order = data.draw(st.permutations([0] * len(lefts) + [1] * len(rights)))
    queues = [
        iter([left_event(*each, more=f', "n": {n}') for n, each in enumerate(lefts)]),
        iter([right_event(*each, w=str(n)) for n, each in enumerate(rights)]),
    ]
    for side in order:
        run.play(Records(side, [next(queues[side])], NOW_US))
    run.add(run.join.drain())
    assert not run.rejected
    one = pd.DataFrame(lefts, columns=["id", "t"]).rename_axis("n").reset_index()
    two = pd.DataFrame(rights, columns=["id", "u"]).rename_axis("w").reset_index()
    both = one.merge(two, on="id")
    both = both[(both.u - both.t).between(*interval)]
    expected = {(n, w) for n, w in zip(both.n, both.w, strict=True)}
    expected |= {(n, None) for n in set(one.n) - set(both.n)}
    found = [(event["n"], event["labels_w"]) for event in map(json.loads, run.out)]
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_a_left_event_is_late_when_it_would_have_gone_and_a_right_event_behind_the_watermark():
    run = Run(join(0, 20))
    run.play(Records(0, [left_event("a", 100)], NOW_US))
    run.play(Records(1, [right_event("a", 100), right_event("a", 99), right_event("a", 100)], NOW_US))
    run.play(Records(0, [left_event("a", 80), left_event("a", 79)], NOW_US))
    assert [(side, kind) for side, kind, _ in run.rejected] == [(1, "late"), (0, "late")]
    assert [json.loads(value)["at"] for value in run.out] == [100, 100, 80, 80]


def test_late_and_unreadable_records_come_with_their_reason_in_the_order_of_offsets():
    what = join(0, 20)
    operator: Operator = IntervalJoin(what)
    operator.process(1, RecordBatch.of_values([right_event("a", 50).value], 0), NOW_US)
    values = [
        left_event("a", 50).value,
        b"{",
        left_event("a", 1).value,
        b'{"at": 1}',
        left_event("a", NOW_US).value,
        b'{"id": 1, "at": 1}',
    ]
    given_ = operator.process(0, RecordBatch.of_values(values, 7), NOW_US)
    assert [(side, reject.kind, reject.offset) for side, reject in given_.rejects] == [
        *[(0, "dead", 8), (0, "late", 9), (0, "dead", 10), (0, "dead", 11), (0, "dead", 12)]
    ]
    reasons = [reject.reason for _, reject in given_.rejects]
    assert "is late: the watermark of the join stood at 1970-01-01T00:00:00.050000Z" in reasons[1]
    assert reasons[2] == "field 'id' is missing" and "from the future" in reasons[3] and "integer" in reasons[4]
    assert [reject.value for _, reject in given_.rejects] == values[1:]


def test_a_right_event_whose_declared_field_has_another_type_is_dead():
    run = Run(join(0, 20))
    run.play(Records(1, [right_event("a", 50, w='"much"'), right_event("a", 50, label="7")], NOW_US))
    assert [kind for _, kind, _ in run.rejected] == ["dead", "dead"]


def test_another_field_can_key_what_comes_out_and_must_be_there():
    run = Run(replace(join(0, 20), key="user"))
    more = ', "user": "ann\\u00e9"'
    run.play(
        Records(0, [left_event("a", 1, more=more), left_event("a", 1), left_event("a", 1, more=', "user": 1')], NOW_US)
    )
    run.play(Records(1, [right_event("a", 2)], NOW_US))
    assert run.keys == ["anné".encode()]
    assert [kind for _, kind, _ in run.rejected] == ["dead", "dead"]


@pytest.mark.parametrize("number", [0, -1, 7, 10**18, -(2**63), 2**63 - 1])
def test_integer_keys_are_decimal_text(number):
    schema = "id bigint, time bigint"
    inputs = (Input("l", "l", "", schema, "time", 0), Input("r", "r", "", schema, "time", 0))
    operator = IntervalJoin(replace(join(0, 20), inputs=inputs))
    value = json.dumps({"id": number, "time": 5}).encode()
    operator.process(0, RecordBatch.of_values([value], 0), NOW_US)
    given_ = operator.process(1, RecordBatch.of_values([value], 0), NOW_US)
    assert given_.keys == [str(number).encode()]
    assert json.loads(given_.values[0]) == {"id": number, "time": 5, "r_id": number, "r_time": 5}


def test_a_key_that_is_neither_text_nor_an_integer_is_refused():
    with pytest.raises(PlanError, match="the key 'w' is double"):
        IntervalJoin(replace(join(0, 1), on="w", inputs=(RIGHT, RIGHT)))


def test_a_snapshot_of_another_declaration_is_refused():
    state = IntervalJoin(join(0, 20)).snapshot()
    with pytest.raises(StateError, match="another declaration"):
        IntervalJoin.restore(join(0, 21), state)


@pytest.mark.parametrize("unmatched", [True, False])
def test_memory_stays_bounded_over_a_long_run(unmatched):
    """Ids that never come again, of which few are within the interval at any time."""
    what = join(0, 1_000, unmatched, (100, 100))
    operator = IntervalJoin(what)
    sizes, given_ = [], 0
    for first in range(0, 100_000, 4_000):
        events = range(first, first + 4_000)
        lefts = [left_event(f"id-{n}", n).value for n in events]
        rights = [right_event(f"id-{n}", n + 5).value for n in events if n % 2]
        given_ += len(operator.process(0, RecordBatch.of_values(lefts, first), NOW_US).values)
        given_ += len(operator.process(1, RecordBatch.of_values(rights, first), NOW_US).values)
        sizes.append(operator.buffered_bytes)
    assert max(sizes) < 6 << 20
    assert max(sizes[12:]) < 1.5 * max(sizes[:12])
    assert len(operator.snapshot()) < 1 << 19
    given_ += len(operator.drain().values)
    assert given_ == (100_000 if unmatched else 50_000)


def test_what_waits_in_a_burst_is_given_back():
    operator = IntervalJoin(join(0, 1_000))
    burst = [left_event(f"id-{n}", 10 + n % 10).value for n in range(50_000)]
    operator.process(0, RecordBatch.of_values(burst, 0), NOW_US)
    full = operator.buffered_bytes
    for at in range(5):
        operator.process(0, RecordBatch.of_values([left_event("later", 100_000 + at).value], 0), NOW_US)
        operator.process(1, RecordBatch.of_values([right_event("later", 100_000 + at).value], 0), NOW_US)
    assert operator.buffered_bytes < full / 20


def test_a_replayed_stream_does_not_wait_in_memory_for_one_that_has_ended(monkeypatch):
    monkeypatch.setattr("streaming.deriving.buffered_join.HELD_BYTES", 1 << 20)
    operator = IntervalJoin(join(0, 1_000))
    operator.process(1, RecordBatch.of_values([right_event("a", 1).value], 0), NOW_US)
    sizes = []
    for first in range(0, 100_000, 5_000):
        lefts = [left_event(f"id-{n}", n).value for n in range(first, first + 5_000)]
        operator.process(0, RecordBatch.of_values(lefts, first), NOW_US)
        operator.tick(NOW_US + 1, 1)
        sizes.append(operator.buffered_bytes)
    assert max(sizes[5:]) <= 2 * max(sizes[:5])
