"""Reports: JSON, Markdown and one offline HTML file from the same numbers, and per-sample statistics in Parquet.

The Parquet file is the source: every score, interval and slice can be computed from it again without inference.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rapidfuzz.distance import Levenshtein

from evaluation import figures
from evaluation.assessment import SMALLEST_SLICE, Assessment, Scores
from evaluation.statistics import Interval

WORST_EXAMPLES = 10
SHOWN_SLICES = 60
SHOWN_CHARACTERS = 500


@dataclass(frozen=True)
class ReportPaths:
    """The files of one report."""

    json: Path
    markdown: Path
    html: Path
    samples: Path


def write(assessment: Assessment, output: Path, title: str, notes: Sequence[str] = ()) -> ReportPaths:
    """Write report.json, report.md, report.html and samples.parquet into the folder, over those of a former run."""
    output.mkdir(parents=True, exist_ok=True)
    paths = ReportPaths(*(output / name for name in ("report.json", "report.md", "report.html", "samples.parquet")))
    content = document(assessment, title, notes)
    paths.json.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    paths.markdown.write_text(_render("report.md.jinja", content), encoding="utf-8")
    paths.html.write_text(_render("report.html.jinja", content | {"figures": figures.draw(content)}), encoding="utf-8")
    pq.write_table(samples(assessment), paths.samples)
    return paths


def document(assessment: Assessment, title: str, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Return all that a report shows, ready for JSON: a number that does not exist is null."""
    split = assessment.split
    return {
        "title": title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "dataset": {"name": split.name, "hash": split.hash, "samples": len(split.ids), "units": assessment.units},
        "resampling": asdict(assessment.resampling),
        "metrics": [
            {"name": each.name, "signature": each.signature, "higher_is_better": each.higher_is_better}
            for each in assessment.metrics
        ],
        "baseline": assessment.baseline,
        "systems": [
            {
                "name": system.name,
                "version": system.version,
                "ms_per_sample": None if system.seconds is None else 1000 * system.seconds / len(split.ids),
                "scores": _scores(assessment.scores)[system.name],
                "difference": {
                    name: {"value": _number(found.value), "p": _number(found.p), **_interval(found.interval)}
                    for name, found in assessment.differences.get(system.name, {}).items()
                },
            }
            for system in assessment.systems
        ],
        "slices": {"smallest": SMALLEST_SLICE, **_slices(assessment)},
        "worst": _worst(assessment),
        "notes": list(notes),
    }


def samples(assessment: Assessment) -> pa.Table:
    """Return one row a system and sample: id, group, slices, reference, prediction, and each metric's statistics."""
    split = assessment.split
    tables = []
    for system in assessment.systems:
        columns: dict[str, Any] = {
            "system": [system.name] * len(split.ids),
            "id": list(split.ids),
            "group": list(split.ids if split.groups is None else split.groups),
            **{f"slice_{dimension}": list(labels) for dimension, labels in split.slices.items()},
            "reference": [str(value) for value in split.references],
            "prediction": [str(value) for value in system.predictions],
        }
        for each in assessment.metrics:
            statistics = assessment.statistics[system.name][each.name]
            columns |= {f"{each.name}_{column}": statistics[:, k] for k, column in enumerate(each.columns)}
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def _scores(scores: Scores) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        system: {
            name: {"score": _number(found.score), **_interval(found.interval)} for name, found in by_metric.items()
        }
        for system, by_metric in scores.items()
    }


def _slices(assessment: Assessment) -> dict[str, list[dict[str, Any]]]:
    named = [
        {"dimension": part.dimension, "label": part.label, "n": part.n, "scores": _scores(part.scores)}
        for part in assessment.slices
    ]
    return {
        "shown": [part for part in named if part["scores"]],
        "hidden": [{key: part[key] for key in ("dimension", "label", "n")} for part in named if not part["scores"]],
    }


def _worst(assessment: Assessment) -> list[dict[str, Any]]:
    """The samples that the first system does worst on, by the first metric; those without any loss are left out."""
    first, metric = assessment.systems[0], assessment.metrics[0]
    losses = metric.losses(assessment.statistics[first.name][metric.name])
    order = np.argsort(-losses, kind="stable")[:WORST_EXAMPLES]
    return [
        {
            "id": assessment.split.ids[index],
            "loss": float(losses[index]),
            "reference": _short(assessment.split.references[index]),
            "predictions": {system.name: _short(system.predictions[index]) for system in assessment.systems},
        }
        for index in order
        if losses[index] > 0
    ]


def _interval(interval: Interval) -> dict[str, Any]:
    return {"low": _number(interval.low), "high": _number(interval.high), "interval": interval.method}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}… ({len(text)} characters)"


def _render(template: str, content: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (files("evaluation") / "templates" / name).read_text("utf-8")),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": _figure, "p": _p, "cell": _cell, "marked": _marked}
    return environment.get_template(template).render(content | {"shown_slices": SHOWN_SLICES}) + "\n"


def _figure(value: float | None, signed: bool = False) -> str:
    if value is None:
        return "–"
    return f"{value:+.4f}" if signed else f"{value:.4f}"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _cell(text: object) -> str:
    """Text as one cell of a Markdown table, whatever stands in it."""
    escaped = str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
    return " ".join(escaped.split())


def _marked(prediction: str, reference: str) -> list[tuple[str, bool]]:
    """Words of a prediction in order, each with whether it stands in the alignment with the reference."""
    truth, words = reference.split(), prediction.split()
    marked: list[tuple[str, bool]] = []
    for block in Levenshtein.opcodes(truth, words):
        marked += [(word, block.tag == "equal") for word in words[block.dest_start : block.dest_end]]
    return marked
