"""Comparisons of experiments: what is claimed, what is not, and that reports say it."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from models import tasks
from models.probe.config import ProbeConfig
from models.runs import opened
from ops.environment import Environment
from ops.experiments import Outcome, compare, markdown, page, write
from ops.trials import Finished, SearchConfig, Trial, best_of

TINY = Path(__file__).parents[2] / "configs" / "probe" / "tiny.yaml"


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


@dataclass
class Trained:
    """What a task's training would do, noted instead: Ray Train takes ten seconds to start."""

    losses: tuple[float, ...] = (0.5, 0.25)
    configs: list[ProbeConfig] = field(default_factory=list)

    def __call__(self, config: ProbeConfig, found: object, *, home: Path, tracking_uri: str) -> dict[str, object]:
        self.configs.append(config)
        with opened(tracking_uri, config.registered_name, "run") as run:
            for step, loss in enumerate(self.losses):
                run.log_metrics({"validation_loss": loss, "train_loss": loss}, step)
        return {"run_id": run.id}


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def trial(tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Trial, Trained]:
    trained = Trained()
    kind = replace(tasks.named("probe"), train=lambda *given, **where: trained(*given, **where))
    monkeypatch.setattr(tasks, "named", lambda name: kind)
    monkeypatch.setenv("MILLRACE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    environment = Environment.read()
    return Trial("probe", environment, "validation_loss", False, "comparison", Finished(tmp_path / "f")), trained


def test_a_trial_trains_once_under_a_name_of_the_comparisons_own(trial: tuple[Trial, Trained]) -> None:
    attempt, trained = trial
    first = attempt(TINY, 3, ["train.steps=7"], "-point")
    assert (first.experiment, first.seed, first.score) == ("tiny-point", 3, 0.25)
    assert first.curves["train_loss"] == [(0, 0.5), (1, 0.25)]
    again = attempt(TINY, 3, ["train.steps=7"], "-point")
    assert json.dumps(asdict(again)) == json.dumps(asdict(first))
    (config,) = trained.configs
    assert config.registered_name == "probe-experiments"
    assert (config.train.steps, config.train.seed, config.train.name) == (7, 3, "comparison-tiny-point-3")
    attempt(TINY, 3, ["train.steps=8"], "-point")
    assert len(trained.configs) == 2, "another recipe"


def test_a_trial_that_cannot_train_says_why_and_is_tried_again(trial: tuple[Trial, Trained]) -> None:
    attempt, trained = trial
    assert "train.steps" in str(attempt(TINY, 0, ["train.steps=no"]).error)
    trained.losses = (math.nan,)
    for tries in (1, 2):
        outcome = attempt(TINY, 0, [])
        assert (outcome.score, outcome.error) == (None, "validation_loss was never a finite number.")
        assert len(trained.configs) == tries


@pytest.mark.parametrize(("higher_is_better", "chosen"), [(True, ("b", 0)), (False, ("a", 1))])
def test_the_best_training_of_the_best_configuration_is_chosen(higher_is_better: bool, chosen: tuple[str, int]) -> None:
    found = [*outcomes("a", [0.9, 0.1, None]), *outcomes("b", [0.8, 0.7]), *outcomes("c", [None])]
    row, best = best_of(compare(found, {}, higher_is_better), found, higher_is_better)
    assert (row.experiment, best.experiment, best.seed) == (chosen[0], *chosen)


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


@pytest.mark.parametrize("distribution", [{"normal": [0, 1]}, {"uniform": [1]}, {"choice": []}, {}])
def test_search_spaces_of_other_forms_are_refused(distribution: dict[str, list[float]]) -> None:
    with pytest.raises(ValidationError, match="must be one of choice"):
        SearchConfig(space={"x": distribution})
