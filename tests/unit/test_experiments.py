"""Comparisons of experiments: what is claimed, what is not, and that reports say it."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from ops.experiments import Outcome, compare, markdown, page, write
from ops.trials import Finished, SearchConfig


def outcomes(name: str, scores: list[float | None]) -> list[Outcome]:
    curves = {"validation_wer": [(10, 0.5), (20, 0.4)]}
    return [Outcome(name, seed, score, {}, curves if score else {}) for seed, score in enumerate(scores)]


@pytest.mark.parametrize(("higher_is_better", "claim"), [(True, "worse"), (False, "better")])
def test_a_difference_is_claimed_with_the_interval_of_a_paired_t_test(higher_is_better: bool, claim: str) -> None:
    first, second = [0.30, 0.32, 0.31, 0.35], [0.20, 0.21, 0.22, 0.24]
    _, row = compare([*outcomes("a", [*first]), *outcomes("b", [*second])], {"b": ["x=1"]}, higher_is_better)
    assert (row.seeds, row.failed, row.overrides, row.claim) == (4, 0, ["x=1"], claim)
    sign = 1 if higher_is_better else -1
    oracle = stats.ttest_rel(np.multiply(sign, second), np.multiply(sign, first)).confidence_interval(0.95)
    assert (row.low, row.high) == pytest.approx((oracle.low, oracle.high))


@pytest.mark.parametrize(
    ("second", "claim"),
    [
        ([0.2, 0.2], "fewer than 3 seeds"),
        ([0.2, 0.2, None], "fewer than 3 seeds"),
        ([0.2, 0.9, 0.1], "the interval holds zero"),
        ([None, None, None], "no seed in common"),
    ],
)
def test_nothing_is_claimed_without_ground(second: list[float | None], claim: str) -> None:
    _, row = compare([*outcomes("a", [0.5, 0.52, 0.51]), *outcomes("b", second)], {}, False)
    assert claim in row.claim
    assert row.failed == second.count(None)


def test_an_interrupted_comparison_knows_what_it_has_trained_with_the_same_recipe(tmp_path: Path) -> None:
    finished, (outcome,) = Finished(tmp_path / "finished"), outcomes("a", [0.5])
    finished.remember(outcome, "recipe")
    again = Finished(tmp_path / "finished")
    recalled = again.recall("a", 0, "recipe")
    assert recalled is not None
    assert json.dumps(asdict(recalled)) == json.dumps(asdict(outcome))
    assert again.recall("a", 0, "another recipe") is again.recall("a", 1, "recipe") is None
    finished.forget()
    assert again.recall("a", 0, "recipe") is None


def test_reports_hold_the_table_the_curves_and_no_markup_of_others(tmp_path: Path) -> None:
    found = [*outcomes("a|b", [0.5, 0.6, 0.7]), *outcomes("<script>", [0.4, None, 0.6])]
    found.append(Outcome("a", 9, None, error="ValueError:\nno"))
    rows = compare(found, {}, False)
    paths = write(tmp_path / "r", "wer", rows, found)
    document = json.loads(Path(paths["json"]).read_text())
    assert [row["experiment"] for row in document["experiments"]] == ["a|b", "<script>", "a"]
    assert len(document["trainings"]) == 7
    assert "- a, seed 9: ValueError: no\n" in Path(paths["md"]).read_text()
    assert markdown("wer", rows).splitlines()[2].startswith("| a\\|b |  | 0.6 | 0.1 | 3 |")
    text = page("wer", rows, found)
    assert "<script>" not in text
    assert "2 (1 failed)" in text
    assert text.count("data:image/svg+xml;base64,") == 1


@pytest.mark.parametrize("space", [{"x": {"normal": [0, 1]}}, {"x": {"uniform": [1]}}, {"x": {}}])
def test_search_spaces_of_other_forms_are_refused(space: dict[str, dict[str, list[float]]]) -> None:
    with pytest.raises(ValidationError, match="must be one of choice"):
        SearchConfig(space=space)
