"""Faults strike the share they are asked to, from the seed, and lose nothing; pacing keeps to the clock."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.producing.columns import Event, Events, from_rows, rows, sorted_within
from streaming.simulators.arrival import (
    DISORDER_US,
    HOUR_US,
    LATE_US,
    MINUTE_US,
    SECOND_US,
    TICK_S,
    Arrivals,
    Faults,
    Held,
    Kind,
    disturb,
    paced,
)

shares = st.floats(0.0, 0.5)
all_faults = st.builds(
    Faults, disorder=shares, duplicates=shares, late=shares, poison=shares, seed=st.integers(0, 2**32)
)
gaps_us = st.lists(st.integers(1, HOUR_US), max_size=60)


class Arrival(NamedTuple):
    due_us: int
    kind: Kind
    key: bytes
    value: bytes


def columns(events: list[Event]) -> Events:
    return from_rows([e.time_us for e in events], [e.key for e in events], [e.value for e in events])


def cut(events: list[Event], size: int) -> list[Events]:
    return [columns(events[start : start + size]) for start in range(0, len(events), size)]


def listed(chunks: Iterable[Arrivals]) -> list[Arrival]:
    return [Arrival(due, kind, event.key, event.value) for chunk in chunks for due, kind, event in chunk.rows()]


def disturbed(events: list[Event], faults: Faults, size: int = 17) -> list[Arrival]:
    return listed(disturb(cut(events, size), faults))


def stream(gaps: list[int]) -> list[Event]:
    """Events with distinct times, a few users, and their number in the value."""
    events, time_us = [], 1_442_016_000 * SECOND_US
    for number, gap in enumerate(gaps):
        time_us += gap
        user = f"u{number % 5}"
        fields = {"seq": number, "time": "2015-09-12T00:00:00.000Z", "user": user, "added": number, "deleted": 0}
        events.append(Event(time_us, user.encode(), orjson.dumps(fields)))
    return events


def day(count: int) -> list[Event]:
    return stream([24 * HOUR_US // count] * count)


@settings(deadline=None)  # a busy machine is no failure
@given(gaps_us, all_faults)
def test_every_event_arrives_once_and_extras_are_copies_or_poison(gaps: list[int], faults: Faults) -> None:
    events = stream(gaps)
    arrivals = disturbed(events, faults)
    originals = [a for a in arrivals if a.kind in (Kind.EVENT, Kind.LATE)]
    assert sorted((a.key, a.value) for a in originals) == sorted((e.key, e.value) for e in events)
    known = {e.value: e.key for e in events}
    assert all(known[a.value] == a.key for a in arrivals if a.kind is Kind.DUPLICATE)
    assert all(a.value not in known and a.key in known.values() for a in arrivals if a.kind is Kind.POISON)


@settings(deadline=None)  # a busy machine is no failure
@given(gaps_us, all_faults)
def test_equal_seeds_give_equal_arrivals_in_the_order_they_are_due(gaps: list[int], faults: Faults) -> None:
    arrivals = disturbed(stream(gaps), faults)
    assert arrivals == disturbed(stream(gaps), faults)
    assert [a.due_us for a in arrivals] == sorted(a.due_us for a in arrivals)


@settings(deadline=None)  # a busy machine is no failure
@given(gaps_us, all_faults)
def test_only_what_counts_as_late_is_too_late(gaps: list[int], faults: Faults) -> None:
    events = stream(gaps)
    time_of = {event.value: event.time_us for event in events}
    clock_us = 0
    for arrival in disturbed(events, faults):
        if arrival.kind is Kind.POISON:
            continue
        behind_us = clock_us - time_of[arrival.value]
        if arrival.kind is Kind.LATE:
            assert behind_us >= LATE_US
        else:
            assert behind_us < LATE_US
        clock_us = max(clock_us, time_of[arrival.value])


@settings(deadline=None)  # a busy machine is no failure
@given(gaps_us, shares, st.integers(0, 2**32))
def test_disorder_and_duplicates_stay_below_the_views_delay_and_sorting_restores_the_order(
    gaps: list[int], share: float, seed: int
) -> None:
    events = stream(gaps)
    time_of = {event.value: event.time_us for event in events}
    arrivals = disturbed(events, Faults(disorder=share, duplicates=share, seed=seed))
    assert all(0 <= arrival.due_us - time_of[arrival.value] < DISORDER_US for arrival in arrivals)
    assert DISORDER_US < 5 * MINUTE_US
    restored = sorted((a for a in arrivals if a.kind is Kind.EVENT), key=lambda a: time_of[a.value])
    assert [a.value for a in restored] == [e.value for e in events]


@settings(deadline=None)  # a busy machine is no failure
@given(gaps_us, all_faults, st.integers(1, 60), st.integers(1, 60))
def test_how_events_are_cut_changes_nothing(gaps: list[int], faults: Faults, one: int, other: int) -> None:
    assert disturbed(stream(gaps), faults, one) == disturbed(stream(gaps), faults, other)


@settings(deadline=None)  # a busy machine is no failure
@given(gaps_us, shares, st.integers(0, 2**32), st.integers(1, 10**9))
def test_events_are_held_back_as_long_as_is_asked(gaps: list[int], share: float, seed: int, within_us: int) -> None:
    events = stream(gaps)
    time_of = {event.value: event.time_us for event in events}
    late_us = 2 * within_us
    faults = Faults(
        disorder=share, duplicates=share, late=share, seed=seed, disorder_us=within_us, late_us=late_us,
        late_spread_us=within_us,
    )  # fmt: skip
    for arrival in disturbed(events, faults):
        held_us = arrival.due_us - time_of[arrival.value]
        assert 0 <= held_us < 3 * within_us
        if arrival.kind is Kind.LATE:
            assert held_us >= late_us


@given(st.lists(st.integers(0, 20)), st.lists(st.integers(0, 20)), st.integers(0, 20))
def test_messages_wait_until_they_are_due_and_keep_their_order(one: list[int], other: list[int], until: int) -> None:
    held = Held()
    numbered = [(due, str(number).encode()) for number, due in enumerate(one + other)]
    for part in (numbered[: len(one)], numbered[len(one) :]):
        if part:
            due_us = np.array([due for due, _ in part], dtype=np.int64)
            held.add(
                due_us,
                np.zeros(len(part), np.int8),
                from_rows(due_us.tolist(), [b""] * len(part), [v for _, v in part]),
            )
    found = [[event.value for _, _, event in ready.rows()] if (ready := held.release(t)) else [] for t in (until, None)]
    ordered = sorted(numbered, key=lambda pair: pair[0])
    assert found == [[v for due, v in ordered if due <= until], [v for due, v in ordered if due > until]]


def test_events_out_of_order_arrive_with_those_before_them() -> None:
    events = [Event(t, b"k", str(t).encode()) for t in (5, 9, 7, 12)]
    found = disturbed(events, Faults(), size=2)
    assert [(a.due_us, a.value) for a in found] == [(5, b"5"), (9, b"9"), (9, b"7"), (12, b"12")]


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 20), st.integers(1, 20))
def test_sorting_within_a_window_restores_what_is_not_further_away(jumble: list[int], window: int, size: int) -> None:
    moved = sorted(range(len(jumble)), key=lambda place: place + jumble[place] % window)  # at most window - 1 away
    events = [Event(place, b"k", str(place).encode()) for place in moved]
    assert list(rows(sorted_within(cut(events, size), window))) == sorted(events)


def test_what_is_further_away_still_comes_once() -> None:
    events = [Event(place, b"k", str(place).encode()) for place in [*range(50, 100), *range(50)]]
    assert sorted(rows(sorted_within(cut(events, 7), 5))) == sorted(events)


def test_without_faults_nothing_changes() -> None:
    events = day(100)
    assert disturbed(events, Faults()) == [Arrival(e.time_us, Kind.EVENT, e.key, e.value) for e in events]


def test_the_shares_are_those_asked_for() -> None:
    events = day(20_000)
    faults = Faults(disorder=0.2, duplicates=0.1, late=0.05, poison=0.03, seed=7)
    arrivals = disturbed(events, faults)
    counts = Counter(arrival.kind for arrival in arrivals)
    # Late events are struck neither by duplication nor, in the last three hours of a day, by being late in the end.
    assert counts[Kind.DUPLICATE] == pytest.approx(20_000 * 0.95 * 0.1, rel=0.1)
    assert counts[Kind.LATE] == pytest.approx(20_000 * 0.05 * 20.5 / 24, rel=0.1)
    assert counts[Kind.POISON] == pytest.approx(20_000 * 0.03, rel=0.1)
    order = [a.value for a in arrivals if a.kind is Kind.EVENT]
    position = {event.value: number for number, event in enumerate(events)}
    overtaken = sum(position[a] > position[b] for a, b in zip(order, order[1:], strict=False))
    assert overtaken > 1000


def test_poison_has_every_flavour_and_none_is_a_good_event() -> None:
    arrivals = disturbed(day(2000), Faults(poison=1.0))
    flavours = Counter(flavour(arrival.value) for arrival in arrivals if arrival.kind is Kind.POISON)
    assert set(flavours) == {"not JSON", "no user", "wrong type", "from the future"}
    assert sum(flavours.values()) == 2000


def flavour(value: bytes) -> str:
    try:
        fields = orjson.loads(value)
    except ValueError:
        return "not JSON"
    if "user" not in fields:
        return "no user"
    if not isinstance(fields["added"], int):
        return "wrong type"
    return "from the future" if fields["time"] > "2900" else "good"


@pytest.mark.parametrize("faults", [{"disorder": -0.1}, {"poison": 1.5}, {"late": 0.6, "disorder": 0.5}])
def test_impossible_shares_are_refused(faults: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(faults))):
        Faults(**faults)  # type: ignore[arg-type]


class FakeClock:
    """Stands in for the monotonic clock, so that pacing is tested without waiting: sleeping moves it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds


def moments(arrivals: list[Arrivals], work_s: float = 0.0, **pace: float) -> list[float]:
    """Seconds after the first arrival at which each is let go, when handling those let go together takes `work_s`."""
    clock = FakeClock()
    found: list[float] = []
    for released in paced(arrivals, clock=clock, sleep=clock.sleep, **pace):
        found += [clock.now_s - 100.0] * len(released)
        clock.now_s += work_s
    return found


def test_a_rate_is_kept_and_a_slow_spell_caught_up() -> None:
    arrivals = list(disturb(cut(day(5), 2), Faults()))
    assert moments(arrivals, rate=10.0) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert moments(arrivals, rate=10.0, work_s=0.05) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_a_high_rate_goes_in_ticks_and_none_is_early_or_waits_longer_than_one() -> None:
    arrivals = list(disturb(cut(day(5000), 700), Faults()))
    found = np.array(moments(arrivals, rate=10_000.0))
    due = np.arange(5000) / 10_000
    assert ((found >= due - 1e-9) & (found <= due + TICK_S + 1e-9)).all()
    assert len(set(found.tolist())) < 300


def test_a_speed_up_divides_event_time() -> None:
    arrivals = list(disturb(cut(stream([1, HOUR_US, 2 * HOUR_US]), 2), Faults()))
    assert moments(arrivals, speed_up=3600.0) == pytest.approx([0.0, 1.0, 3.0])


def test_without_a_pace_nothing_waits() -> None:
    assert moments(list(disturb(cut(day(5), 2), Faults()))) == [0.0] * 5


@pytest.mark.parametrize("pace", [{"rate": 0.0}, {"speed_up": -1.0}, {"rate": 1.0, "speed_up": 1.0}])
def test_an_impossible_pace_is_refused(pace: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="--"):
        list(paced(disturb(cut(day(1), 1), Faults()), **pace))
