"""Every function over every kind of window against numpy and pandas, from the events that each window holds."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.partition import Partition
from streaming.plan import Aggregate, Plan
from tests.window_oracle import (
    COLUMNS,
    DELAY_MS,
    START_MS,
    Happened,
    Log,
    batch,
    check,
    expected,
    feed,
    histories,
    plan,
    rows,
)


@settings(max_examples=120, deadline=None)
@given(histories(), st.sampled_from([(50, 10), (30, 30)]), st.booleans())
def test_fresh_windows(batches, window, restart):
    length, slide = window
    what = plan({"window_us": length * 1000, "slide_us": slide * 1000})
    partition, log = Partition(what, 0), Log()
    latest: dict[str, Any] = {}
    for events in batches:
        found: list[Any] = []
        feed(partition, log, events, found)
        if restart:
            partition = Partition.restore(what, 0, partition.snapshot())
        latest |= {user: features for user, _, features in found}
        end = log.clock // slide * slide + slide
        for user in {event.user for event in log.taken}:
            held = [event for event in log.of(user, end - length, end)]
            check(latest[user], expected(held))


@settings(max_examples=150, deadline=None)
@given(histories(), st.sampled_from([(50, 10), (30, 30), (40, 20)]), st.sampled_from([0, 20, 100]))
def test_final_windows_are_told_once_and_revised_within_the_lateness(batches, window, lateness):
    length, slide = window
    shape = {"window_us": length * 1000, "slide_us": slide * 1000}
    partition, log = Partition(plan(shape, emission="final", lateness_us=lateness * 1000), 0), Log()
    found: list[Any] = []
    for events in batches:
        feed(partition, log, events, found)
        assert all(time <= log.clock - DELAY_MS for _, time, _ in found)
    found += rows(partition.drain())
    assert rows(partition.emit()) == []
    last = {(user, time): features for user, time, features in found}
    if not lateness:
        assert len(last) == len(found)
    for user in {event.user for event in log.taken}:
        times = [event.time for event in log.taken if event.user == user]
        before: list[Happened] = []
        for end in range(min(times) // slide * slide + slide, max(times) + length + 2 * slide, slide):
            held = log.of(user, end - length, end)
            if held != before and ({e.x for e in held} | {e.word for e in held} | {e.x for e in before}) != {None}:
                values_change = [(e.x, e.word) for e in held] != [(e.x, e.word) for e in before]
                if values_change and (user, end) not in last:
                    # only panes without any value come and go without a row
                    assert all(e.x is None and e.word is None for e in set(held) ^ set(before))
            if (user, end) in last:
                check(last[user, end], expected(held))
            before = held


def sessions_of(events: Sequence[Happened], gap: int) -> list[list[Happened]]:
    """Runs of events less than a gap apart, by brute force; events stay in offset order within a run."""
    found: list[list[Happened]] = []
    for time in sorted({event.time for event in events}):
        if found and time - max(event.time for event in found[-1]) < gap:
            found[-1] += [event for event in events if event.time == time]
        else:
            found.append([event for event in events if event.time == time])
    order = {id(event): at for at, event in enumerate(events)}
    return [sorted(run, key=lambda event: order[id(event)]) for run in found]


@settings(max_examples=200, deadline=None)
@given(histories(late=False), st.sampled_from([4, 20, 50]), st.booleans())
def test_sessions(batches, gap, restart):
    shape = {"window_us": gap * 1000, "kind": "session"}
    fresh, final = Partition(plan(shape), 0), Partition(plan(shape, emission="final"), 0)
    log, same = Log(), Log()
    latest: dict[str, Any] = {}
    ended: list[Any] = []
    for events in batches:
        found: list[Any] = []
        feed(fresh, log, events, found)
        feed(final, same, events, ended)
        if restart:
            fresh = Partition.restore(fresh.plan, 0, fresh.snapshot())
            final = Partition.restore(final.plan, 0, final.snapshot())
        latest |= {user: features for user, _, features in found}
        for user in {event.user for event in log.taken}:
            runs = sessions_of([event for event in log.taken if event.user == user], gap)
            going_on = [run for run in runs if log.clock < max(event.time for event in run) + gap]
            check(latest[user], expected(going_on[-1] if going_on else []))
    ended += rows(final.drain())
    told = {(user, time): features for user, time, features in ended}
    assert len(told) == len(ended)
    runs = [run for user in "ab" for run in sessions_of([e for e in same.taken if e.user == user], gap)]
    assert len(told) == len(runs)
    for run in runs:
        check(told[run[0].user, max(event.time for event in run) + gap], expected(run))


@settings(max_examples=120, deadline=None)
@given(histories(), st.sampled_from([1, 3, 50]), st.booleans())
def test_windows_by_count(batches, size, restart):
    partition, log = Partition(plan({"kind": "last", "size": size}), 0), Log()
    latest: dict[str, Any] = {}
    for events in batches:
        found: list[Any] = []
        feed(partition, log, events, found)
        if restart:
            partition = Partition.restore(partition.plan, 0, partition.snapshot())
        latest |= {user: features for user, _, features in found}
        for user in {event.user for event in log.taken}:
            in_time = sorted((event for event in log.taken if event.user == user), key=lambda event: event.time)
            check(latest[user], expected(in_time[-size:]))
    assert len(log.taken) == log.offset


@settings(max_examples=120, deadline=None)
@given(histories(), st.booleans())
def test_lifetimes_and_decay(batches, restart):
    decayed = Aggregate("decayed_mean_x", "x", "decayed_mean", window_us=50_000, kind="lifetime")
    what = plan({"kind": "lifetime"})
    what = Plan(**{**vars(what), "aggregates": (*what.aggregates, decayed)})
    partition, log = Partition(what, 0), Log()
    latest: dict[str, Any] = {}
    for events in batches:
        found: list[Any] = []
        feed(partition, log, events, found)
        if restart:
            partition = Partition.restore(partition.plan, 0, partition.snapshot())
        latest |= {user: features for user, _, features in found}
    assert len(log.taken) == log.offset
    for user in {event.user for event in log.taken}:
        held = [event for event in log.taken if event.user == user]
        weighed = [(event.x, 0.5 ** ((log.clock - event.time) / 50)) for event in held if event.x is not None]
        weight = sum(weight for _, weight in weighed)
        mean = sum(x * weight for x, weight in weighed) / weight if weighed else None
        check(latest[user], expected(held) | {"decayed_mean_x": mean})


@settings(max_examples=120, deadline=None)
@given(histories(), st.booleans())
def test_clocks_of_entities(batches, restart):
    length, slide = 50, 10
    what = plan({"window_us": length * 1000, "slide_us": slide * 1000}, clocks="key")
    partition, log = Partition(what, 0), Log()
    latest: dict[str, Any] = {}
    for events in batches:
        found: list[Any] = []
        clocks: dict[str, int] = {}
        for event in log.taken:
            clocks[event.user] = max(clocks.get(event.user, 0), event.time)
        taken = []
        for event in events:
            clocks[event.user] = max(clocks.get(event.user, 0), event.time)
            taken.append(event.time // slide * slide + slide > clocks[event.user] - DELAY_MS)
        feed(partition, log, events, found)
        assert log.taken[len(log.taken) - sum(taken) :] == [e for e, ok in zip(events, taken, strict=True) if ok]
        if restart:
            partition = Partition.restore(what, 0, partition.snapshot())
        latest |= {user: (time, features) for user, time, features in found}
        for user, (time, features) in latest.items():
            clock = max(event.time for event in log.taken if event.user == user)
            assert time == clock
            end = clock // slide * slide + slide
            check(features, expected(log.of(user, end - length, end)))


def test_clocks_of_entities_go_on_with_the_wall_clock():
    aggregates = (Aggregate("n", "x", "count", window_us=10_000, slide_us=10_000),)
    what = Plan("v", "t", "", "user", "string", "time", COLUMNS[:1], aggregates, 0, clocks="key")
    partition = Partition(what, 0)
    partition.process(batch([Happened("a", 1_000, 1.0, None), Happened("b", 500_000, 1.0, None)], 0), now_us=10**12)
    assert [(user, time) for user, time, _ in rows(partition.emit())] == [("a", 1_000), ("b", 500_000)]
    partition = Partition.restore(what, 0, partition.snapshot())
    partition.tick(10**12 + 10_000)
    assert rows(partition.emit()) == [("a", 1_010, {"n": 0}), ("b", 500_010, {"n": 0})]


def test_time_that_is_left_out_moves_no_clock_also_after_a_restart():
    aggregates = (Aggregate("n", "x", "count", window_us=10_000, slide_us=10_000),)
    what = Plan("v", "t", "", "user", "string", "time", COLUMNS[:1], aggregates, 0, clocks="key")
    partition = Partition(what, 0)
    partition.process(batch([Happened("a", 1_000, 1.0, None), Happened("b", 500_000, 1.0, None)], 0), now_us=10**12)
    partition.emit()
    chain = [partition.snapshot()]
    partition.leave_out(3_600_000_000)
    chain.append(partition.delta())
    for one in (partition, Partition.restore(what, 0, *chain)):
        one.tick(10**12 + 3_600_000_000 + 4_000)
        assert rows(one.emit()) == []
        assert one.clock_us == 500_004_000
        one.tick(10**12 + 3_600_000_000 + 10_000)
        assert rows(one.emit()) == [("a", 1_010, {"n": 0}), ("b", 500_010, {"n": 0})]


@settings(max_examples=100, deadline=None)
@given(histories(), st.sampled_from(["sliding", "session", "last", "lifetime"]), st.sampled_from(["fresh", "final"]))
def test_deltas_restore_what_a_snapshot_does(batches, kind, emission):
    if kind in ("last", "lifetime"):
        emission = "fresh"
    shape = {"kind": kind, "window_us": 50_000 if kind != "lifetime" else 0, "size": 3 if kind == "last" else 0}
    shape |= {"slide_us": 10_000} if kind == "sliding" else {}
    what = plan(shape, emission=emission)
    partition, log = Partition(what, 0), Log()
    chain = [partition.snapshot()]
    for events in batches:
        feed(partition, log, events, [])
        chain.append(partition.delta())
        restored = Partition.restore(what, 0, *chain)
        assert restored.snapshot() == Partition.restore(what, 0, partition.snapshot()).snapshot()
    assert Partition.restore(what, 0, *chain).state_bytes <= 2 * partition.state_bytes  # blocks were given back
    assert Partition.restore(what, 0, partition.snapshot()).snapshot() == partition.snapshot()


def test_sketches_keep_their_stated_errors():
    random = np.random.default_rng(3)
    x = random.lognormal(0, 1, 60_000)
    words = random.zipf(1.3, 60_000) % 5_000
    shape = {"window_us": 60_000_000, "slide_us": 20_000_000}
    functions = [("count_distinct", "x"), ("p1", "x"), ("p50", "x"), ("p95", "x"), ("p99", "x")]
    functions += [("count_distinct", "word"), ("top_5", "word")]
    aggregates = tuple(Aggregate(f"{name}_{column}", column, name, **shape) for name, column in functions)
    partition = Partition(Plan("v", "t", "", "user", "string", "time", COLUMNS, aggregates, 0), 0)
    times = np.sort(random.integers(START_MS - START_MS % 60_000, START_MS - START_MS % 60_000 + 60_000, len(x)))
    events = [
        Happened("a", time, value, f"word {word}")
        for time, value, word in zip(times.tolist(), x.tolist(), words.tolist(), strict=True)
    ]
    partition.process(batch(events, 0), now_us=10**15)
    ((_, _, found),) = rows(partition.emit())
    assert found["count_distinct_x"] == pytest.approx(len(set(x)), rel=4 * 0.033)
    assert found["count_distinct_word"] == pytest.approx(len(set(words.tolist())), rel=4 * 0.033)
    for name, q in (("p1_x", 0.01), ("p50_x", 0.5), ("p95_x", 0.95), ("p99_x", 0.99)):
        assert abs((x < found[name]).mean() - q) < 0.01 * 2 * math.sqrt(q * (1 - q)), name
    assert found["top_5_word"] == [f"word {word}" for word, _ in Counter(words.tolist()).most_common(5)]
