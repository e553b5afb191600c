"""Reports: three renderings of the same numbers, harmless whatever the texts are, and Parquet that reproduces them."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from evaluation import EvaluationResult, compare_models, evaluate, generate_report
from evaluation.assessment import Assessment, assess, summary
from evaluation.batch import BatchError, Split, System, run
from evaluation.metrics import metric
from evaluation.report import ReportPaths, document, write
from evaluation.results import ResultsError
from evaluation.statistics import Resampling, score

NASTY = "<script>alert(1)</script> | $x$ `code`"
QUICK = Resampling(replicates=200)
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Collects what a browser would act on, and refuses tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def assessment() -> Assessment:
    rng = np.random.default_rng(0)
    references = [" ".join(rng.choice(["one", "two", "three", "four"], 4)) for _ in range(100)]
    better = [NASTY if index == 0 else reference for index, reference in enumerate(references)]
    worse = [" ".join(rng.permutation(reference.split())) for reference in references]
    split = Split(
        name=f"spoken {NASTY}",
        hash="0123456789abcdef",
        ids=[f"{NASTY} {index}" for index in range(100)],
        references=references,
        slices={"speaker": [NASTY] * 40 + ["ann"] * 40 + ["bob"] * 20},
    )
    systems = [System("champion", "w version 2", better, seconds=5.0), System("baseline", "w version 1", worse)]
    return assess(split, systems, [metric("wer"), metric("cer")], baseline="baseline", resampling=QUICK)


@pytest.fixture(scope="module")
def paths(assessment: Assessment, tmp_path_factory: pytest.TempPathFactory) -> ReportPaths:
    return write(assessment, tmp_path_factory.mktemp("report"), f"Evaluation {NASTY}", [f"A note {NASTY}"])


def test_json_holds_what_the_summary_says(assessment: Assessment, paths: ReportPaths) -> None:
    content = json.loads(paths.json.read_text())
    scores = content["systems"][0]["scores"]["wer"]
    assert scores["score"] == summary(assessment)["champion"]["wer"] > 0
    assert content["systems"][0]["difference"]["wer"]["p"] == summary(assessment)["difference"]["wer_p"]
    assert content["systems"][0]["ms_per_sample"] == pytest.approx(50)
    assert content["dataset"]["hash"] == "0123456789abcdef"
    assert content["metrics"][0]["signature"] == metric("wer").signature
    assert content["resampling"] == {"replicates": 200, "seed": 0, "level": 0.95}


def test_small_slices_are_hidden_but_named(paths: ReportPaths) -> None:
    content = json.loads(paths.json.read_text())
    assert [(part["label"], part["n"]) for part in content["slices"]["shown"]] == [(NASTY, 40), ("ann", 40)]
    assert content["slices"]["hidden"] == [{"dimension": "speaker", "label": "bob", "n": 20}]
    assert "1 slices with n < 30 are hidden: speaker bob (20)." in paths.markdown.read_text()


def test_the_worst_example_comes_with_every_answer(assessment: Assessment, paths: ReportPaths) -> None:
    worst = json.loads(paths.json.read_text())["worst"]
    assert len(worst) == 1, "the champion has one error"
    assert worst[0]["predictions"]["champion"] == NASTY
    assert worst[0]["predictions"]["baseline"] == assessment.systems[1].predictions[0]


def test_html_is_one_harmless_offline_file(paths: ReportPaths) -> None:
    page = Page()
    page.feed(paths.html.read_text())
    assert not page.open, "every tag is closed"
    assert "script" not in page.seen
    assert page.addresses, "there are figures"
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert NASTY in page.text
    assert paths.html.stat().st_size < 2_000_000


def test_markdown_tables_stay_tables(paths: ReportPaths) -> None:
    text = paths.markdown.read_text()
    assert "<script>" not in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert set(table[1]) == {"|", "-"}
        assert {row.replace("\\|", "").count("|") for row in table} == {table[1].count("|")}


def test_scores_can_be_computed_again_from_the_parquet(assessment: Assessment, paths: ReportPaths) -> None:
    table = pq.read_table(paths.samples)
    for system in ("champion", "baseline"):
        rows = table.filter([value == system for value in table["system"].to_pylist()])
        statistics = np.column_stack([rows["wer_word_errors"].to_numpy(), rows["wer_words"].to_numpy()])
        assert score(metric("wer"), statistics) == summary(assessment)[system]["wer"]


def test_a_huge_answer_does_not_make_a_huge_page(tmp_path: Path) -> None:
    answers = evaluate("long", ["x " * 200_000], ["a"], metrics=["wer"], resampling=QUICK)
    paths = generate_report([answers], tmp_path, resampling=QUICK)
    assert paths.html.stat().st_size < 2_000_000
    assert "(400000 characters)" in paths.markdown.read_text()


def test_a_number_that_does_not_exist_is_null() -> None:
    split = Split("one class", "0", ["1", "2"], [1, 1])
    found = document(assess(split, [System("a", "1", [0.5, 0.6])], [metric("auroc")], resampling=QUICK), "title")
    assert found["systems"][0]["scores"]["auroc"] == {
        "score": None,
        "low": None,
        "high": None,
        "interval": "undetermined",
    }


def test_evaluate_returns_results_by_metric() -> None:
    results = evaluate("m", ["a b", "c"], ["a b", "d"], inputs=["x", "y"], metrics=["wer", "cer"], resampling=QUICK)
    assert isinstance(results["wer"], EvaluationResult)
    assert (results["wer"].metric_name, results["wer"].score) == ("wer", pytest.approx(1 / 3))
    assert results["wer"].details["n"] == 2
    assert results["wer"].details["inputs"] == ("x", "y")


def test_compare_models_takes_the_first_as_the_baseline() -> None:
    references = ["a b c"] * 40
    bad = evaluate("bad", ["x y z"] * 40, references, resampling=QUICK)
    good = evaluate("good", ["a b c"] * 40, references, resampling=QUICK)
    assert compare_models([bad, good], resampling=QUICK)["good"]["wer"].value == -1.0
    with pytest.raises(ResultsError, match="other references"):
        compare_models([bad, evaluate("other", ["a"] * 40, ["b"] * 40, resampling=QUICK)])
    with pytest.raises(ResultsError, match="same name"):
        compare_models([bad, bad])


def test_every_sample_must_be_answered() -> None:
    with pytest.raises(BatchError, match="1 predictions for 2 samples"):
        evaluate("m", ["a"], ["a", "b"])
    with pytest.raises(BatchError, match="no samples"):
        evaluate("m", [], [])
    with pytest.raises(BatchError, match="batch of 2 with 1 outputs"):
        run("m", "1", lambda batch: batch[:1], [1, 2, 3], 2)


def test_batches_keep_the_order() -> None:
    assert run("m", "1", lambda batch: [2 * value for value in batch], list(range(7)), 3).predictions == list(
        range(0, 14, 2)
    )
