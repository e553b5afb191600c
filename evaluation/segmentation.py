"""Compares segmentation experiments over seeds: their table, and their gain over the best threshold with intervals."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import statistics
from evaluation.metrics.dice import MeanDice
from evaluation.statistics import Interval, Resampling
from models.segmentation.scans import Mask, Scan
from models.segmentation.scores import score

ALL = "all"


@dataclass(frozen=True)
class Row:
    """What network and rule scored on one image of a test split; rows of the same `unit` are not independent."""

    id: str
    kind: str
    unit: str
    network: Mapping[str, float]
    rule: Mapping[str, float]


@dataclass(frozen=True)
class Trial:
    """One training of an experiment with one seed, and its test split."""

    experiment: str
    change: str
    seed: int
    key: str
    """Identifies configuration and data."""
    split_hash: str
    validation_dice: float
    validation_iou: float
    threshold: float
    peak: float
    parameters: int
    seconds: float
    rule_name: str
    rows: tuple[Row, ...]

    def save(self, path: Path) -> None:
        """Write the trial as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        os.replace(partial, path)


def load_trial(path: Path, key: str) -> Trial | None:
    """The trial in a file, or None where there is none of that key."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(Row(**row) for row in found.pop("rows"))
        return Trial(**found, rows=rows) if found["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def rows(scans: Sequence[Scan], masks: Sequence[Mask], rule_masks: Sequence[Mask], prefix: str = "") -> tuple[Row, ...]:
    """Score the masks of a test split; `prefix` sets units apart where the same name means other images."""
    return tuple(
        Row(scan.id, scan.kind, prefix + scan.group, score(mask, scan.mask), score(rule, scan.mask))
        for scan, mask, rule in zip(scans, masks, rule_masks, strict=True)
    )


@dataclass(frozen=True)
class Gain:
    """Mean Dice of the network and of the rule on the images of one kind, over all seeds, and the paired difference."""

    kind: str
    images: int
    units: int
    network: float
    network_interval: Interval
    rule: float
    rule_interval: Interval
    difference: float
    difference_interval: Interval
    p: float


def gains(trials: Sequence[Trial], resampling: Resampling | None = None) -> list[Gain]:
    """The gains over the test splits of all these trials together."""
    return gains_of([row for trial in trials for row in trial.rows], resampling)


def gains_of(pooled: Sequence[Row], resampling: Resampling | None = None) -> list[Gain]:
    """One gain for all images and one for each kind; units (groups of near-duplicates) are resampled, not images."""
    kinds = sorted({row.kind for row in pooled})
    chosen = [(ALL, pooled), *((kind, [row for row in pooled if row.kind == kind]) for kind in kinds)]
    return [_gain(kind, of_kind, resampling or Resampling()) for kind, of_kind in chosen]


def _gain(kind: str, pooled: Sequence[Row], resampling: Resampling) -> Gain:
    metric = MeanDice()
    units = statistics.units_of([row.unit for row in pooled], len(pooled))
    network, rule = (
        np.array([[float(scores["dice"])] for scores in found])
        for found in ([row.network for row in pooled], [row.rule for row in pooled])
    )
    difference = statistics.difference(metric, network, rule, units, resampling)
    return Gain(
        kind=kind,
        images=len(pooled),
        units=int(units.max()) + 1,
        network=statistics.score(metric, network),
        network_interval=statistics.interval(metric, network, units, resampling),
        rule=statistics.score(metric, rule),
        rule_interval=statistics.interval(metric, rule, units, resampling),
        difference=difference.value,
        difference_interval=difference.interval,
        p=difference.p,
    )


def table(trials: Sequence[Trial]) -> str:
    """Markdown: a line an experiment, each figure the mean over its seeds, with the spread where there are several."""
    lines = [
        "| experiment | change | parameters | seeds | val Dice | val IoU | test Dice | test HD95 px | threshold Dice |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(trial.experiment for trial in trials):
        own = [trial for trial in trials if trial.experiment == name]
        figures = [
            _spread([trial.validation_dice for trial in own]),
            _spread([trial.validation_iou for trial in own]),
            _spread([_mean(trial, "dice") for trial in own]),
            _spread([_mean(trial, "hausdorff95_px") for trial in own], 1),
            _spread([float(np.mean([row.rule["dice"] for row in trial.rows])) for trial in own]),
        ]
        lines.append(f"| {name} | {own[0].change} | {own[0].parameters:,} | {len(own)} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def gain_table(found: Sequence[Gain]) -> str:
    """Markdown: a line a kind, with 95% intervals."""
    lines = [
        "| images | n | groups | network Dice | best threshold Dice | difference | p |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        lines.append(
            f"| {one.kind} | {one.images} | {one.units} | {one.network:.3f} {_ends(one.network_interval)} | "
            f"{one.rule:.3f} {_ends(one.rule_interval)} | {one.difference:+.3f} {_ends(one.difference_interval)} | "
            f"{one.p:.3f} |"
        )
    return "\n".join(lines) + "\n"


def write(trials: Sequence[Trial], folder: Path) -> dict[str, object]:
    """Write `experiments.md` and `experiments.json`; the same as a dictionary."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(trial.experiment for trial in trials))
    found = {name: gains([trial for trial in trials if trial.experiment == name]) for name in names}
    text = [table(trials), *(f"\n{name} against the best threshold\n\n{gain_table(found[name])}" for name in names)]
    (folder / "experiments.md").write_text("".join(text), encoding="utf-8")
    result: dict[str, object] = {name: {one.kind: {**asdict(one)} for one in found[name]} for name in names}
    (folder / "experiments.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def _mean(trial: Trial, name: str) -> float:
    return float(np.mean([row.network[name] for row in trial.rows]))


def _spread(values: Sequence[float], digits: int = 3) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def _ends(interval: Interval) -> str:
    return f"[{interval.low:.3f}, {interval.high:.3f}]"
