"""What a partition forgets of entities, panes and texts, when, and that no value changes by it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming import entities as entities_module
from streaming.allowance import Allowance
from streaming.partition import Partition
from streaming.plan import Aggregate, Plan
from streaming.state import StateError
from tests.window_oracle import COLUMNS, START_MS, Happened, batch, check, expected, plan, rows


def test_entities_without_state_are_forgotten_and_known_again():
    aggregates = (Aggregate("n", "x", "count", window_us=10_000, slide_us=10_000),)
    what = Plan("v", "t", "", "user", "string", "time", COLUMNS[:1], aggregates, 0)
    partition = Partition(what, 0)
    many = [Happened(f"user {number}", START_MS, 1.0, None) for number in range(12_000)]
    partition.process(batch(many, 0), now_us=10**15)
    partition.emit()
    large = len(partition.snapshot())
    assert partition.counters.keys == 12_000
    partition.process(batch([Happened("user 7", START_MS + 60_000, 1.0, None)], 12_000), now_us=10**15)
    assert len(rows(partition.emit())) == 12_000
    small = partition.snapshot()
    assert partition.counters.keys == 1
    assert len(small) < large / 100
    partition = Partition.restore(what, 0, small)
    again = [Happened("user 8", START_MS + 60_001, 1.0, None), Happened("user 7", START_MS + 60_001, 1.0, None)]
    partition.process(batch(again, 12_001), now_us=10**15)
    assert sorted((user, features["n"]) for user, _, features in rows(partition.emit())) == [
        ("user 7", 2),
        ("user 8", 1),
    ]


def test_idle_entities_of_lifetimes_are_forgotten_after_their_ttl():
    aggregates = (Aggregate("n", "x", "count", kind="lifetime"),)
    what = Plan("v", "t", "", "user", "string", "time", COLUMNS[:1], aggregates, 0, idle_ttl_us=1_000_000)
    partition = Partition(what, 0)
    many = [Happened(f"user {number}", START_MS, 1.0, None) for number in range(12_000)]
    partition.process(batch([*many, Happened("user 3", START_MS + 1_001, 1.0, None)], 0), now_us=10**15)
    partition.emit()
    partition.snapshot()
    assert partition.counters.keys == 1
    partition.process(batch([Happened("user 3", START_MS + 2_001, 1.0, None)], 12_001), now_us=10**15)
    assert [(user, features["n"]) for user, _, features in rows(partition.emit())] == [("user 3", 2)]


@pytest.mark.parametrize("between", [Partition.snapshot, Partition.shrink, Partition.delta, None])
def test_an_entity_that_comes_back_after_the_ttl_begins_anew_whatever_was_saved_between(between):
    aggregates = (Aggregate("n", "x", "count", kind="lifetime"), Aggregate("last", "word", "last", kind="last", size=5))
    what = Plan("v", "t", "", "user", "string", "time", COLUMNS, aggregates, 0, idle_ttl_us=1_000_000)
    partition = Partition(what, 0)
    many = [Happened(f"user {number}", START_MS, 1.0, "oak") for number in range(12_000)]
    partition.process(batch([*many, Happened("user 3", START_MS + 1_001, 1.0, None)], 0), now_us=10**15)
    partition.emit()
    if between is not None:
        between(partition)
    back = [Happened("user 8", START_MS + 1_001, 1.0, None), Happened("user 3", START_MS + 2_001, 1.0, None)]
    partition.process(batch(back, 12_001), now_us=10**15)
    assert sorted(rows(partition.emit()))[:2] == [
        ("user 3", START_MS + 2_001, {"n": 2, "last": None}),
        ("user 8", START_MS + 2_001, {"n": 1, "last": None}),
    ]


def test_windows_that_end_by_themselves_do_not_follow_the_ttl():
    sliding = Aggregate("sliding", "x", "count", window_us=50_000, slide_us=10_000)
    aggregates = (sliding, Aggregate("lifetime", "x", "count", kind="lifetime"))
    partition = Partition(Plan("v", "t", "", "user", "string", "time", COLUMNS, aggregates, 0, idle_ttl_us=20_000), 0)
    events = [Happened("a", 1_000, 1.0, None), Happened("b", 1_030, 1.0, None), Happened("a", 1_045, 1.0, None)]
    partition.process(batch(events, 0), now_us=10**15)
    assert rows(partition.emit())[0] == ("a", 1_045, {"sliding": 2, "lifetime": 1})


def test_a_device_whose_clock_lags_is_not_forgotten_while_it_sends(monkeypatch):
    monkeypatch.setattr(entities_module, "_FEW", 1)
    what = Plan(
        *("v", "t", "", "user", "string", "time", COLUMNS),
        (Aggregate("n", "x", "count", kind="lifetime"),),
        delay_us=0,
        clocks="key",
        idle_ttl_us=30_000,
    )
    partition = Partition(what, 0)
    for step in range(20):
        lagging = [Happened("lagging", START_MS - 86_400 + 10 * step, 1.0, None)] * (step != 10)
        others = [Happened(f"user {step} {number}", START_MS + 10 * step, 1.0, None) for number in range(5)]
        partition.process(batch([*others, *lagging], partition.next_offset), now_us=10**15)
        found = {user: features["n"] for user, _, features in rows(partition.emit())}
        partition = Partition.restore(what, 0, partition.snapshot())
    assert found["lagging"] == 19
    assert partition.counters.keys < 40  # the others are silent, and forgotten


@st.composite
def crowds(draw: Callable[..., Any]) -> list[list[Happened]]:
    """Batches of several users, who are silent for a while now and then, and of words most of which come once."""
    time = START_MS
    batches = []
    for _ in range(draw(st.integers(2, 10))):
        events = []
        users = draw(st.sampled_from(["ab", "abcdef", "gh"]))
        for _ in range(draw(st.integers(1, 8))):
            time += draw(st.sampled_from([0, 0, 1, 5, 12, 40]))
            at = time + draw(st.sampled_from([0, 0, 0, -3, -14, -40, -90]))
            word = draw(st.none() | st.just("oak") | st.integers(0, 99).map(lambda number: f"word {number}"))
            events.append(
                Happened(draw(st.sampled_from(users)), at, draw(st.none() | st.sampled_from([0.5, -3.0])), word)
            )
        batches.append(events)
    return batches


SHAPES = {
    "sliding": {"window_us": 50_000, "slide_us": 10_000},
    "session": {"window_us": 20_000, "kind": "session"},
    "last": {"kind": "last", "size": 3},
    "lifetime": {"kind": "lifetime"},
}


@settings(max_examples=40, deadline=None)
@given(
    crowds(),
    st.sampled_from(
        [("sliding",), ("session",), ("last",), ("lifetime",), ("sliding", "lifetime"), ("last", "session")]
    ),
    st.sampled_from([{}, {"emission": "final"}, {"emission": "final", "lateness_us": 30_000}, {"clocks": "key"}]),
    st.sampled_from([0, 25_000, 70_000]),
    st.data(),
)
def test_what_is_forgotten_and_when_changes_no_value(batches, kinds, how, ttl_us, data):
    if {"last", "lifetime"} & set(kinds) or len(kinds) > 1:
        how = {name: value for name, value in how.items() if name == "clocks"}
    whats = [plan(SHAPES[kind], **how, idle_ttl_us=ttl_us) for kind in kinds]
    renamed = [
        replace(each, name=f"{each.name} {kind}")
        for kind, what in zip(kinds, whats, strict=True)
        for each in what.aggregates
    ]
    what = replace(whats[0], aggregates=tuple(renamed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entities_module, "_FEW", 1)
        whole, parts, chain = Partition(what, 0), Partition(what, 0), [Partition(what, 0).snapshot()]
        now_us = 10**15
        for events in batches:
            records = batch(events, whole.next_offset)
            assert whole.process(records, now_us) == parts.process(records, now_us)
            if data.draw(st.booleans()):
                now_us += data.draw(st.sampled_from([5_000, 30_000, 100_000]))
                whole.tick(now_us)
                parts.tick(now_us)
            told = [sorted(map(repr, rows(partition.emit()))) for partition in (whole, parts)]
            assert told[0] == told[1]
            do = data.draw(st.sampled_from(["snapshot", "snapshot", "delta", "shrink", "nothing"]))
            if do == "shrink":
                parts.shrink()
                chain = []
            elif do == "snapshot" or (do == "delta" and not chain):
                chain = [parts.snapshot()]
            elif do == "delta":
                chain.append(parts.delta())
            if do in ("snapshot", "delta"):
                parts = Partition.restore(what, 0, *chain)


@settings(max_examples=150, deadline=None)
@given(crowds(), st.sampled_from(["last", "lifetime"]), st.sampled_from(["partition", "key"]), st.booleans())
def test_a_silence_is_longer_than_the_ttl_by_the_newest_event_of_all(batches, kind, clocks, restart):
    ttl = 25
    what = plan(SHAPES[kind], clocks=clocks, idle_ttl_us=ttl * 1000)
    latest: dict[str, Any] = {}
    held: dict[str, list[Happened]] = {}
    heard: dict[str, int] = {}
    newest = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entities_module, "_FEW", 1)
        partition = Partition(what, 0)
        for events in batches:
            for event in events:
                newest = max(newest, event.time)
                if heard.get(event.user, newest) + ttl < newest:
                    held[event.user] = []
                heard[event.user] = newest
                held.setdefault(event.user, []).append(event)
            assert partition.process(batch(events, partition.next_offset), now_us=10**15) == []
            latest |= {user: features for user, _, features in rows(partition.emit())}
            if restart:
                partition = Partition.restore(what, 0, partition.snapshot())
            for user, mine in held.items():
                in_time = sorted(mine, key=lambda event: event.time)
                check(latest[user], expected(in_time[-3:] if kind == "last" else mine))


def test_a_partition_that_has_shrunk_is_saved_whole():
    partition = Partition(plan(SHAPES["lifetime"], idle_ttl_us=1_000), 0)
    many = [Happened(f"user {number}", START_MS, 1.0, "oak") for number in range(12_000)]
    partition.process(batch([*many, Happened("a", START_MS + 100, 1.0, "oak")], 0), now_us=10**15)
    partition.emit()
    partition.delta()
    partition.shrink()
    assert partition.counters.keys == 1
    with pytest.raises(StateError, match="saved whole"):
        partition.delta()
    assert Partition.restore(partition.plan, 0, partition.snapshot(), partition.delta()).counters.keys == 1


def test_clocks_of_entities_are_kept_since_they_say_what_is_late(monkeypatch):
    monkeypatch.setattr(entities_module, "_FEW", 1)
    what = plan(SHAPES["sliding"], clocks="key")
    partition = Partition(what, 0)
    partition.process(batch([Happened("a", 1_000, 1.0, None)], 0), now_us=10**12)
    partition.emit()
    partition.tick(10**12 + 500_000)
    partition.emit()
    partition = Partition.restore(what, 0, partition.snapshot())
    (late,) = partition.process(batch([Happened("a", 1_300, 1.0, None)], 1), now_us=10**12 + 500_000)
    assert late.kind == "late"


@pytest.mark.parametrize("functions", [("last",), ("first",), ("top_2",), ("count", "last")])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("same_users", [False, True])
def test_texts_that_no_row_names_are_forgotten(monkeypatch, functions, kind, same_users):
    if kind == "lifetime" and functions in [("first",), ("top_2",)] and same_users:
        return  # they keep what they have seen
    monkeypatch.setattr(entities_module, "_FEW", 100)
    shape = SHAPES[kind] | ({"size": 1} if kind == "last" else {})
    aggregates = tuple(Aggregate(name, "word", name, **shape) for name in functions)
    what = Plan("v", "t", "", "user", "string", "time", COLUMNS[1:], aggregates, 0, idle_ttl_us=20_000)
    partition = Partition(what, 0)
    sizes = []
    for step in range(30):
        users = range(50) if same_users else range(50 * step, 50 * step + 50)
        events = [
            Happened(f"user {user}", START_MS + 100 * step, None, f"word {step} {user} {number}")
            for user in users
            for number in range(4)
        ]
        partition.process(batch(events, partition.next_offset), now_us=10**15)
        found = {user: features for user, time, features in rows(partition.emit()) if time == events[-1].time}
        partition = Partition.restore(what, 0, partition.snapshot())
        sizes.append(partition.state_bytes)
        for user in users if "last" in functions else ():
            assert found[f"user {user}"]["last"] == f"word {step} {user} 3"
    assert max(sizes[15:]) <= 1.5 * max(sizes[:15])


def test_a_snapshot_holds_only_the_panes_that_do():
    aggregates = (Aggregate("mean", "x", "mean", window_us=1_000_000_000, slide_us=1_000_000),)
    what = Plan("v", "t", "", "user", "string", "time", COLUMNS[:1], aggregates, 0)
    partition = Partition(what, 0)
    users = [f"user {number}" for number in range(500)]
    for step in range(3):
        events = [Happened(user, START_MS + 2_000 * step, 1.0, None) for user in users]
        partition.process(batch(events, step * len(users)), now_us=10**15)
    rings = 1_000 * 500 * 8
    whole = partition.snapshot()
    assert len(whole) < rings / 10
    round_again = [Happened("user 1", START_MS + 1_000 * step, 1.0, None) for step in range(7, 1_100)]
    partition.process(batch(round_again, 1_500), now_us=10**15)
    assert Partition.restore(what, 0, whole, partition.delta()).snapshot() == partition.snapshot()


@pytest.mark.parametrize("emitting", [True, False])
def test_a_pane_that_is_passed_gives_its_memory_back(emitting):
    aggregates = tuple(
        Aggregate(name, "x", name, window_us=30_000, slide_us=10_000) for name in ("count_distinct", "p50", "top_2")
    )
    partition = Partition(Plan("v", "t", "", "user", "string", "time", COLUMNS[:1], aggregates, 0), 0)
    taken = []
    for step in range(60):
        events = [Happened(user, START_MS + 10 * step * gap, 1.0, None) for user, gap in (("a", 1), ("b", 2), ("c", 5))]
        partition.process(batch(events, 3 * step), now_us=10**15)
        if emitting:
            partition.emit()
            assert partition.panes <= 3 + 2 + 1
        taken.append(partition.state_bytes)
    assert taken[10] == taken[-1]


def test_more_state_than_the_limit_is_refused_in_a_sentence():
    partition = Partition(plan({"window_us": 50_000, "slide_us": 10_000}), 0, Allowance(20_000_000))
    many = [Happened(f"user {number}", START_MS, 1.0, "oak") for number in range(20_000)]
    with pytest.raises(ValueError, match="take 0, and all together may take 19: raise the limit"):
        partition.process(batch(many, 0), now_us=10**15)
    assert 0 < partition.state_bytes < 20_000_000
