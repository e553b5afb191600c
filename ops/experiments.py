"""Comparing experiments: several configurations, several seeds each, as JSON, Markdown and one HTML file with curves.

A difference between two configurations is claimed only where both have the same three seeds or more and the paired
interval (Student's t over the seeds) leaves out zero: one seed more or less is the least that can be learnt from.
"""

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

FEWEST_SEEDS = 3
LEVEL = 0.95


@dataclass(frozen=True)
class Outcome:
    """One training: `score` is the best validation's primary metric, None where the training failed."""

    experiment: str
    seed: int
    score: float | None
    result: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Row:
    """One experiment over its seeds; `gain` is how much better it is than the first one, positive being better."""

    experiment: str
    overrides: Sequence[str]
    seeds: int
    failed: int
    mean: float | None
    deviation: float | None
    gain: float | None = None
    low: float | None = None
    high: float | None = None
    claim: str = "the one compared with"


def compare(outcomes: Sequence[Outcome], overrides: Mapping[str, Sequence[str]], higher_is_better: bool) -> list[Row]:
    """One row an experiment, in the order of their first outcomes; the others are held against the first."""
    names = list(dict.fromkeys(outcome.experiment for outcome in outcomes))
    scores = {name: {one.seed: one.score for one in outcomes if one.experiment == name} for name in names}
    others = {name: scores[names[0]] for name in names[1:]}
    return [_row(name, overrides.get(name, ()), scores[name], others.get(name), higher_is_better) for name in names]


def _row(
    name: str,
    overrides: Sequence[str],
    scores: Mapping[int, float | None],
    first: Mapping[int, float | None] | None,
    higher_is_better: bool,
) -> Row:
    known = [score for score in scores.values() if score is not None]
    mean = float(np.mean(known)) if known else None
    deviation = float(np.std(known, ddof=1)) if len(known) > 1 else None
    row = Row(name, list(overrides), len(known), len(scores) - len(known), mean, deviation)
    if first is None:
        return row
    sign = 1 if higher_is_better else -1
    pairs = [(scores[seed], first.get(seed)) for seed in scores]
    gains = [sign * (own - other) for own, other in pairs if own is not None and other is not None]
    if not gains:
        return Row(**asdict(row) | {"claim": "no seed in common"})
    gain = float(np.mean(gains))
    if len(gains) < FEWEST_SEEDS:
        return Row(**asdict(row) | {"gain": gain, "claim": f"none: fewer than {FEWEST_SEEDS} seeds"})
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(gains) - 1) * np.std(gains, ddof=1) / math.sqrt(len(gains)))
    claim = "better" if gain - half > 0 else "worse" if gain + half < 0 else "none: the interval holds zero"
    return Row(**asdict(row) | {"gain": gain, "low": gain - half, "high": gain + half, "claim": claim})


def write(folder: Path, metric: str, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Write comparison.json, comparison.md and comparison.html; their paths by kind."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"metric": metric, "experiments": [asdict(row) for row in rows]}
    document["trainings"] = [asdict(outcome) for outcome in outcomes]
    texts = {
        "json": json.dumps(document, indent=2, default=str) + "\n",
        "md": f"# Comparison by {metric}\n\n{markdown(metric, rows)}{_failures(outcomes)}",
        "html": page(metric, rows, outcomes),
    }
    for kind, text in texts.items():
        (folder / f"comparison.{kind}").write_text(text, encoding="utf-8")
    return {kind: str(folder / f"comparison.{kind}") for kind in texts}


def markdown(metric: str, rows: Sequence[Row]) -> str:
    """The rows as a table of Markdown."""
    head, *cells = _cells(metric, rows)
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines) + "\n"


def page(metric: str, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> str:
    """One HTML file that needs no network: the table and the curves."""
    head, *cells = [[html.escape(text) for text in line] for line in _cells(metric, rows)]
    table = "<tr><th>" + "<th>".join(head) + "".join("<tr><td>" + "<td>".join(line) for line in cells)
    names = sorted({name for outcome in outcomes for name in outcome.curves})
    figures = "".join(
        f'<h2>{html.escape(name)}</h2><img alt="{html.escape(name)} by step" src="{_curves(name, outcomes)}">'
        for name in names
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Comparison by {html.escape(metric)}</title>'
        "<style>body{font:16px sans-serif;max-width:60em;margin:2em auto}td,th{padding:.3em 1em;text-align:left;"
        "border-bottom:1px solid #ddd}img{max-width:100%}</style>"
        f"<h1>Comparison by {html.escape(metric)}</h1><table>{table}</table>{figures}</html>\n"
    )


def _failures(outcomes: Sequence[Outcome]) -> str:
    """Which trainings failed and why, a line each."""
    failed = [one for one in outcomes if one.error is not None]
    lines = [f"- {one.experiment}, seed {one.seed}: {' '.join(str(one.error).split())[:300]}" for one in failed]
    return "\n".join(["", "Failed:", "", *lines, ""]) if failed else ""


def _cells(metric: str, rows: Sequence[Row]) -> list[list[str]]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    head = ["experiment", "changed", metric, "± seeds", "seeds", "gain", f"{LEVEL:.0%} interval", "claim"]
    return [head] + [
        [
            row.experiment,
            " ".join(row.overrides),
            number(row.mean),
            number(row.deviation),
            f"{row.seeds}" + (f" ({row.failed} failed)" if row.failed else ""),
            number(row.gain),
            "" if row.low is None else f"{number(row.low)} to {number(row.high)}",
            row.claim,
        ]
        for row in rows
    ]


def _curves(name: str, outcomes: Sequence[Outcome]) -> str:
    """A figure of one metric by step, a line a training and a colour an experiment, as a data address."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    experiments = list(dict.fromkeys(outcome.experiment for outcome in outcomes))
    for outcome in outcomes:
        points = outcome.curves.get(name, ())
        place = experiments.index(outcome.experiment)
        label = outcome.experiment if outcome.experiment not in axes.get_legend_handles_labels()[1] else None
        axes.plot(*zip(*points, strict=True) if points else ([], []), "o-", color=f"C{place % 10}", ms=3, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(name, parse_math=False)
    axes.legend(frameon=False)
    content = BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"
