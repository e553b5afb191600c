"""WER and CER: golden values, jiwer as the oracle, and statistics that merge."""

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import statistics
from evaluation.metrics import MetricError, metric

WORDS = st.lists(st.sampled_from(["a", "b", "cat", "Ünder", "日本", "dog."]), max_size=6).map(" ".join)
PAIRS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=12)


def rate(name: str, predictions: list[str], references: list[str]) -> float:
    return statistics.score(metric(name), metric(name).statistics(predictions, references))


def test_golden_values() -> None:
    assert rate("wer", ["X X Y Y"], ["X"]) == 3.0
    assert rate("cer", ["X X Y Y"], ["X"]) == 6.0
    assert rate("wer", ["the cat sat"], ["the cat sat"]) == 0.0
    assert rate("wer", ["the bat sat on"], ["the cat sat"]) == pytest.approx(2 / 3)


def test_corpus_rate_is_not_the_mean_of_the_samples() -> None:
    assert rate("wer", ["x", "a b c d e f g h i"], ["a", "a b c d e f g h i"]) == pytest.approx(1 / 10)


def test_empty_reference_counts_insertions() -> None:
    assert rate("wer", ["two words", "a b"], ["", "a b"]) == pytest.approx(2 / 2)
    assert rate("wer", ["two words"], [""]) == 2.0
    assert rate("wer", [""], [""]) == 0.0


@pytest.mark.parametrize(("name", "oracle"), [("wer", jiwer.wer), ("cer", jiwer.cer)])
@settings(max_examples=40, deadline=None)
@given(pairs=PAIRS)
def test_equals_jiwer(name: str, oracle: object, pairs: list[tuple[str, str]]) -> None:
    references, predictions = [reference for reference, _ in pairs], [prediction for _, prediction in pairs]
    assert rate(name, predictions, references) == pytest.approx(oracle(references, predictions))


@settings(max_examples=40, deadline=None)
@given(pairs=PAIRS, cut=st.integers(0, 12))
def test_statistics_of_parts_add_up_to_those_of_the_whole(pairs: list[tuple[str, str]], cut: int) -> None:
    wer = metric("wer")
    references, predictions = [reference for reference, _ in pairs], [prediction for _, prediction in pairs]
    whole = wer.statistics(predictions, references)
    parts = [wer.statistics(predictions[:cut], references[:cut]), wer.statistics(predictions[cut:], references[cut:])]
    assert whole.dtype == np.int64
    assert sum(part.sum(axis=0) for part in parts).tolist() == whole.sum(axis=0).tolist()


def test_the_worst_sample_is_the_one_with_most_errors() -> None:
    wer = metric("wer")
    assert wer.losses(wer.statistics(["a", "x y z", "b"], ["a", "a b c", "c"])).tolist() == [0, 3, 1]


def test_refuses_what_is_no_text() -> None:
    with pytest.raises(MetricError, match="prediction 2 is of type int"):
        metric("wer").statistics(["a", 3], ["a", "b"])
