"""Faults strike the share they are asked to, from the seed, and lose nothing; pacing keeps to the clock."""

from collections import Counter

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.simulators.arrival import (
    DISORDER_US,
    HOUR_US,
    LATE_US,
    MINUTE_US,
    SECOND_US,
    Arrival,
    Event,
    Faults,
    Kind,
    disturb,
    paced,
)

shares = st.floats(0.0, 0.5)
all_faults = st.builds(
    Faults, disorder=shares, duplicates=shares, late=shares, poison=shares, seed=st.integers(0, 2**32)
)
gaps_us = st.lists(st.integers(1, HOUR_US), max_size=60)


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
    arrivals = list(disturb(events, faults))
    originals = [a for a in arrivals if a.kind in (Kind.EVENT, Kind.LATE)]
    assert sorted((a.key, a.value) for a in originals) == sorted((e.key, e.value) for e in events)
    known = {e.value: e.key for e in events}
    assert all(known[a.value] == a.key for a in arrivals if a.kind is Kind.DUPLICATE)
    assert all(a.value not in known and a.key in known.values() for a in arrivals if a.kind is Kind.POISON)


@settings(deadline=None)  # a busy machine is no failure
@given(gaps_us, all_faults)
def test_equal_seeds_give_equal_arrivals_in_the_order_they_are_due(gaps: list[int], faults: Faults) -> None:
    arrivals = list(disturb(stream(gaps), faults))
    assert arrivals == list(disturb(stream(gaps), faults))
    assert [a.due_us for a in arrivals] == sorted(a.due_us for a in arrivals)


@settings(deadline=None)  # a busy machine is no failure
@given(gaps_us, all_faults)
def test_only_what_counts_as_late_is_too_late(gaps: list[int], faults: Faults) -> None:
    events = stream(gaps)
    time_of = {event.value: event.time_us for event in events}
    clock_us = 0
    for arrival in disturb(events, faults):
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
    arrivals = list(disturb(events, Faults(disorder=share, duplicates=share, seed=seed)))
    assert all(0 <= arrival.due_us - time_of[arrival.value] < DISORDER_US for arrival in arrivals)
    assert DISORDER_US < 5 * MINUTE_US
    restored = sorted((a for a in arrivals if a.kind is Kind.EVENT), key=lambda a: time_of[a.value])
    assert [a.value for a in restored] == [e.value for e in events]


def test_without_faults_nothing_changes() -> None:
    events = day(100)
    assert list(disturb(events, Faults())) == [Arrival(e.time_us, Kind.EVENT, e.key, e.value) for e in events]


def test_the_shares_are_those_asked_for() -> None:
    events = day(20_000)
    faults = Faults(disorder=0.2, duplicates=0.1, late=0.05, poison=0.03, seed=7)
    arrivals = list(disturb(events, faults))
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
    arrivals = disturb(day(2000), Faults(poison=1.0))
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


def moments(arrivals: list[Arrival], work_s: float = 0.0, **pace: float) -> list[float]:
    """Seconds after the first arrival at which each is let go, when handling one takes `work_s`."""
    clock = FakeClock()
    found = []
    for _ in paced(arrivals, clock=clock, sleep=clock.sleep, **pace):
        found.append(clock.now_s - 100.0)
        clock.now_s += work_s
    return found


def test_a_rate_is_kept_and_a_slow_spell_caught_up() -> None:
    arrivals = list(disturb(day(5), Faults()))
    assert moments(arrivals, rate=10.0) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert moments(arrivals, rate=10.0, work_s=0.05) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_a_speed_up_divides_event_time() -> None:
    arrivals = list(disturb(stream([1, HOUR_US, 2 * HOUR_US]), Faults()))
    assert moments(arrivals, speed_up=3600.0) == pytest.approx([0.0, 1.0, 3.0])


def test_without_a_pace_nothing_waits() -> None:
    assert moments(list(disturb(day(5), Faults()))) == [0.0] * 5


@pytest.mark.parametrize("pace", [{"rate": 0.0}, {"speed_up": -1.0}, {"rate": 1.0, "speed_up": 1.0}])
def test_an_impossible_pace_is_refused(pace: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="--"):
        list(paced(disturb(day(1), Faults()), **pace))
