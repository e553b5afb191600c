"""Metrics by name: those built in, and any package's through the entry point group `millrace.metrics`."""

from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import cast

from evaluation.metrics.auroc import AreaUnderROC
from evaluation.metrics.dice import MeanDice
from evaluation.metrics.metric import Metric, MetricError
from evaluation.metrics.wer import CER, WER

GROUP = "millrace.metrics"
BUILT_IN: dict[str, Metric] = {each.name: each for each in (WER, CER, AreaUnderROC(), MeanDice())}


def names() -> list[str]:
    """Return every name that `metric` knows, sorted; nothing is imported for it."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=GROUP))})


def metric(name: str) -> Metric:
    """Return the metric of that name; an entry point names an object with the attributes of `Metric`.

    Raises:
        MetricError: the name is unknown; the message names the nearest.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    for point in entry_points(group=GROUP, name=name):
        return cast(Metric, point.load())
    known = names()
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
    raise MetricError(f"There is no metric {name!r}: {hint}")
