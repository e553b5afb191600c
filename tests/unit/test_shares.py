"""Dealing partitions: everything once, evenly, with as few moves as can be."""

from hypothesis import given
from hypothesis import strategies as st

from streaming.shares import Unit, deal


@given(st.integers(0, 20), st.integers(0, 20), st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_any_history_of_scaling_deals_everything_once_and_evenly(first, second, sizes):
    held: dict[int, set[Unit]] = {}
    for units_count, members in zip([first, second, *[second] * len(sizes)], sizes, strict=False):
        units = [Unit("view", number) for number in range(units_count)]
        before = {member: held.get(member, set()) for member in range(members)}
        held = deal(units, before)
        assert sorted(unit for share in held.values() for unit in share) == units
        counts = [len(share) for share in held.values()]
        assert max(counts) - min(counts) <= 1


@given(st.integers(1, 30), st.integers(1, 6))
def test_dealing_again_moves_nothing_and_one_more_member_takes_only_its_share(count, members):
    units = [Unit("view", number) for number in range(count)]
    held = deal(units, {member: set() for member in range(members)})
    assert deal(units, held) == held
    more = deal(units, held | {members: set()})
    assert sum(len(held[member] - more[member]) for member in held) == len(more[members])
