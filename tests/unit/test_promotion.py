"""The gate of a promotion."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops.promotion import Gate, decide

Sums = list[tuple[float, float]]


def edits(each: Sequence[float], length: float = 10) -> Sums:
    return [(one, length) for one in each]


BAD, GOOD = edits([3, 4, 2, 5] * 20), edits([1, 1, 0, 2] * 20)
GATE = Gate("wer", higher_is_better=False, minimum_gain=0.01, guards={"cer": 0.02})
DIRECTIONS = {"wer": False, "cer": False}
EACH = [str(number) for number in range(80)]


def test_what_is_better_by_enough_and_worse_at_nothing_passes() -> None:
    decision = decide(GATE, {"wer": GOOD, "cer": BAD}, {"wer": BAD, "cer": BAD}, DIRECTIONS, EACH)
    assert decision.promoted
    assert decision.gain == pytest.approx(0.25)
    assert 0 < decision.low < 0.25 < decision.high
    assert "wer 0.1000 against 0.3500, a gain of 0.2500 (95%" in decision.reason


def test_a_guard_holds_back_what_forgets() -> None:
    decision = decide(GATE, {"wer": GOOD, "cer": BAD}, {"wer": BAD, "cer": GOOD}, DIRECTIONS, EACH)
    assert not decision.promoted
    assert "but cer 0.3500 against 0.1000: worse by more than 0.02" in decision.reason


def test_a_gain_that_is_small_or_chance_is_not_enough() -> None:
    slightly = edits([3, 4, 2, 5] * 19 + [3, 4, 2, 4])
    small = decide(GATE, {"wer": slightly, "cer": BAD}, {"wer": BAD, "cer": BAD}, DIRECTIONS, EACH)
    assert (small.promoted, "less than 0.01" in small.reason) == (False, True)
    own, other = {"wer": edits([0, 5, 3, 4]), "cer": BAD}, {"wer": edits([5, 1, 4, 5]), "cer": BAD}
    luck = decide(GATE, own, other, DIRECTIONS, EACH[:4])
    assert (luck.promoted, "it may be chance" in luck.reason) == (False, True)


@given(st.lists(st.integers(0, 1), min_size=5, max_size=60), st.lists(st.integers(0, 1), min_size=60, max_size=60))
def test_a_direction_turned_round_turns_the_gain(first: list[int], second: list[int]) -> None:
    own, other = edits(first, 1), edits(second[: len(first)], 1)
    higher = decide(Gate("x", True), {"x": own}, {"x": other}, {}, EACH[: len(own)])
    lower = decide(Gate("x", False), {"x": own}, {"x": other}, {}, EACH[: len(own)])
    assert higher.gain == pytest.approx(-lower.gain)
    assert not (higher.promoted and lower.promoted)
    assert not decide(Gate("x", True), {"x": own}, {"x": own}, {}, EACH[: len(own)]).promoted


def test_many_samples_of_few_sentences_are_no_evidence() -> None:
    own, other = {"wer": edits([1] * 20 + [3] * 20 + [4] * 20)}, {"wer": edits([5] * 20 + [3] * 20 + [3] * 20)}
    gate = Gate("wer", higher_is_better=False)
    assert decide(gate, own, other, DIRECTIONS, EACH[:60]).promoted
    together = decide(gate, own, other, DIRECTIONS, ["one"] * 20 + ["two"] * 20 + ["three"] * 20)
    assert (together.promoted, "it may be chance" in together.reason) == (False, True)


def test_a_guard_on_a_part_of_the_split_sees_what_the_whole_hides() -> None:
    nothing = [(0.0, 0.0)] * 40
    own = {"wer": GOOD, "wer/general": [*edits([6] * 40), *nothing]}
    other = {"wer": BAD, "wer/general": [*edits([1] * 40), *nothing]}
    gate = Gate("wer", higher_is_better=False, guards={"wer/general": 0.05})
    decision = decide(gate, own, other, DIRECTIONS, EACH)
    assert not decision.promoted
    assert "but wer/general 0.6000 against 0.1000: worse by more than 0.05" in decision.reason
