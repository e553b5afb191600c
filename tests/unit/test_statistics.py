"""Intervals and tests: known answers, coverage on data whose truth is known, and where a bootstrap collapses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from evaluation.metrics import metric
from evaluation.statistics import (
    Resampling,
    degenerate_margin,
    difference,
    interval,
    randomisation_p,
    score,
    units_of,
    wilson,
)

WER = metric("wer")
QUICK = Resampling(replicates=400)


def utterances(rng: np.random.Generator, n: int, wrong: float) -> np.ndarray:
    """Mostly right, a few bad: with chance `wrong` each word of an utterance is wrong with chance 0.6."""
    words = rng.integers(1, 6, n)
    return np.column_stack([rng.binomial(words, 0.6 * (rng.random(n) < wrong)), words])


@settings(max_examples=40, deadline=None)
@given(trials=st.integers(1, 500), share=st.floats(0, 1))
def test_wilson_equals_scipy(trials: int, share: float) -> None:
    successes = round(share * trials)
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_interval_agrees_with_the_normal_one_where_that_holds() -> None:
    rng = np.random.default_rng(1)
    wrong = rng.binomial(1, 0.3, 2000)
    found = interval(WER, np.column_stack([wrong, np.ones(2000)]), np.arange(2000), Resampling(replicates=2000))
    half = norm.ppf(0.975) * np.sqrt(wrong.mean() * (1 - wrong.mean()) / 2000)
    assert found.method == "bca"
    assert (found.low, found.high) == pytest.approx((wrong.mean() - half, wrong.mean() + half), abs=3e-3)


def test_interval_covers_the_truth_of_a_skewed_rate() -> None:
    rng = np.random.default_rng(2)
    truth, runs = 0.05 * 0.6, 300
    covered = 0
    for seed in range(runs):
        found = interval(WER, utterances(rng, 100, 0.05), np.arange(100), Resampling(replicates=400, seed=seed))
        covered += found.low <= truth <= found.high
    assert 0.90 <= covered / runs <= 0.99, "a percentile bootstrap stays at 0.88 here"


@pytest.mark.parametrize(
    ("errors", "low", "high"), [(0, 0.0, degenerate_margin(50)), (4, 1 - degenerate_margin(50), None)]
)
def test_no_error_or_nothing_right_is_not_certainty(errors: int, low: float, high: float | None) -> None:
    rows = np.column_stack([np.full(50, errors), np.full(50, 4)])
    found = interval(WER, rows, np.arange(50), QUICK)
    assert found.method == "degenerate"
    assert found.low == pytest.approx(low)
    assert found.high == pytest.approx(1 + degenerate_margin(50) if high is None else high)
    assert degenerate_margin(50) == pytest.approx(wilson(0, 50)[1])


def test_collapsed_interval_covers_a_rare_error() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        wrong = rng.binomial(1, 0.01, 100)
        found = interval(WER, np.column_stack([wrong, np.ones(100)]), np.arange(100), QUICK)
        covered += found.low <= 0.01 <= found.high
    assert covered / 300 >= 0.93


def test_interval_is_undetermined_where_most_resamples_have_no_score() -> None:
    auroc = metric("auroc")
    found = interval(auroc, auroc.statistics([0.1, 0.2], [1, 1]), np.arange(2), QUICK)
    assert found.method == "undetermined"
    assert np.isnan([found.low, found.high]).all()


def test_same_seed_same_interval_and_other_seed_another() -> None:
    rows = utterances(np.random.default_rng(4), 80, 0.3)
    units = np.arange(80)
    assert interval(WER, rows, units, QUICK) == interval(WER, rows, units, QUICK)
    assert interval(WER, rows, units, QUICK) != interval(WER, rows, units, Resampling(replicates=400, seed=1))


def test_blocks_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = utterances(np.random.default_rng(5), 60, 0.3)
    whole = interval(WER, rows, np.arange(60), QUICK)
    monkeypatch.setattr("evaluation.statistics.BLOCK_ELEMENTS", 1000)
    assert interval(WER, rows, np.arange(60), QUICK) == whole


def test_alike_samples_of_one_group_do_not_count_as_evidence() -> None:
    rows = utterances(np.random.default_rng(6), 60, 0.4)
    alone = interval(WER, rows, np.arange(60), QUICK)
    groups = units_of([str(index) for index in range(60)] * 10, 600)
    repeated = interval(WER, np.tile(rows, (10, 1)), groups, QUICK)
    assert repeated.high - repeated.low == pytest.approx(alone.high - alone.low, rel=0.15)
    naive = interval(WER, np.tile(rows, (10, 1)), np.arange(600), QUICK)
    assert naive.high - naive.low < 0.5 * (repeated.high - repeated.low)


def test_pairing_narrows_the_difference_of_two_alike_systems() -> None:
    rng = np.random.default_rng(7)
    first = utterances(rng, 200, 0.4)
    second = first.copy()
    second[:20, 0] = first[:20, 1]
    found = difference(WER, first, second, np.arange(200), QUICK)
    alone = interval(WER, first, np.arange(200), QUICK)
    assert found.value == pytest.approx(score(WER, first) - score(WER, second))
    assert found.interval.high < 0
    assert found.interval.high - found.interval.low < alone.high - alone.low
    assert found.p < 0.01


def test_a_system_does_not_differ_from_itself() -> None:
    rows = utterances(np.random.default_rng(8), 50, 0.4)
    found = difference(WER, rows, rows, np.arange(50), QUICK)
    assert (found.value, found.p, found.interval.method) == (0.0, 1.0, "degenerate")
    assert found.interval.low == pytest.approx(-degenerate_margin(50))
    assert found.interval.high == pytest.approx(degenerate_margin(50))


def test_randomisation_p_is_that_of_the_sign_test() -> None:
    """Ten samples, the first system better in each by one error: only 2 of 2^10 assignments are as extreme."""
    better, worse = np.column_stack([np.zeros(10), np.ones(10)]), np.column_stack([np.ones(10), np.ones(10)])
    found = randomisation_p(WER, better, worse, np.arange(10), Resampling(replicates=50_000))
    assert found == pytest.approx(2 / 2**10, abs=6e-4)


def test_randomisation_p_is_uniform_where_the_systems_are_exchangeable() -> None:
    rng = np.random.default_rng(9)
    found = []
    for seed in range(300):
        words = np.full(60, 5)
        first, second = (np.column_stack([rng.binomial(words, 0.3), words]) for _ in range(2))
        found.append(randomisation_p(WER, first, second, np.arange(60), Resampling(replicates=200, seed=seed)))
    assert 0.02 <= np.mean(np.array(found) <= 0.05) <= 0.09
    assert 0.40 <= np.mean(np.array(found) <= 0.5) <= 0.60
