"""AUROC: scikit-learn as the oracle, with ties and weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from evaluation import statistics
from evaluation.metrics import MetricError, metric

AUROC = metric("auroc")
SAMPLES = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.50001, 1.0]), st.booleans(), st.integers(0, 3)), min_size=2, max_size=30
)


@settings(max_examples=40, deadline=None)
@given(samples=SAMPLES)
def test_equals_scikit_learn_with_ties_and_weights(samples: list[tuple[float, bool, int]]) -> None:
    scores, labels, weights = (np.array(column, dtype=float) for column in zip(*samples, strict=True))
    found = AUROC.scores(AUROC.statistics(list(scores), list(labels)), weights[None, :])[0]
    if not (weights[labels == 1].sum() and weights[labels == 0].sum()):
        assert np.isnan(found)
    else:
        assert found == pytest.approx(roc_auc_score(labels, scores, sample_weight=weights))


def test_a_constant_score_tells_nothing() -> None:
    assert statistics.score(AUROC, AUROC.statistics([0.3] * 4, [1, 0, 0, 1])) == 0.5


def test_perfect_separation_is_not_certain() -> None:
    rows = AUROC.statistics([0.9] * 10 + [0.1] * 90, [1] * 10 + [0] * 90)
    found = statistics.interval(AUROC, rows, np.arange(100), statistics.Resampling(replicates=200))
    assert found.method == "degenerate"
    assert found.high == 1.0
    assert found.low == pytest.approx(1 - statistics.degenerate_margin(10)), "the rarer class bounds what is known"


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [("high", 1, "prediction 1 is 'high'"), (float("nan"), 1, "prediction 1 is nan"), (0.5, 2, "reference 1 is 2")],
)
def test_refuses_what_it_cannot_judge(prediction: object, label: object, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        AUROC.statistics([prediction], [label])
