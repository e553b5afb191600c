"""Evaluate a trained segmentation model on a configuration's test split, against the best threshold rule."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np

from evaluation.segmentation import gain_table, gains_of, rows
from models.registry import ModelVersion, Registry
from models.segmentation import data, figures, predict
from models.segmentation.config import SegmentationConfig
from models.segmentation.scores import METRICS
from models.segmentation.train import threshold_masks
from ops.configuration import load
from ops.environment import Environment
from ops.jobs import parser, run

logger = logging.getLogger(__name__)


def main() -> dict[str, object]:
    """Score network and rule, with intervals; write `evaluation.md`, `evaluation.json` and the panels."""
    arguments = parser(__doc__ or "", config="configs/segmentation/exp_006.yaml")
    arguments.add_argument("--model", default="champion", help="folder, version or alias of a model (%(default)s)")
    arguments.add_argument("--output", type=Path, help="folder (default MILLRACE_HOME/reports/NAME-evaluation)")
    given = arguments.parse_args()
    environment = Environment.read()
    environment.export()
    config = load(SegmentationConfig, given.config, given.overrides)
    name = config.registered_name
    output = (given.output or environment.home / "reports" / f"{name}-evaluation").absolute()
    folder, version = Registry(environment.tracking_uri).find(given.model, name, environment.home / "models")
    predictor = predict.load(folder)
    found = data.splits(config.data, environment.data)
    if version is not None and version.split_hash != found.hash:
        _warn_of_split(version, found)
    masks = [one.mask for one in predictor.segment([scan.image for scan in found.test])]
    rule, rule_masks = threshold_masks(config, found)
    scored = rows(found.test, masks, rule_masks)
    result: dict[str, object] = {
        "images": len(scored),
        "data_hash": found.hash,
        "rule": rule,
        "means": {name: round(float(np.mean([row.network[name] for row in scored])), 4) for name in METRICS},
        "gains": {one.kind: asdict(one) for one in gains_of(scored)},
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "evaluation.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    (output / "evaluation.md").write_text(gain_table(gains_of(scored)), encoding="utf-8")
    figures.panels(predictor, found.test, config.predict.panels, output / "predictions.png")
    return {**result, "report": str(output / "evaluation.md")}


def _warn_of_split(version: ModelVersion, found: data.Splits) -> None:
    beside = f"version {version.version} was trained beside test split {version.split_hash}"
    line = {"event": "other split", "split_hash": found.hash, "reason": f"{beside}: it may have seen these images"}
    logger.warning(json.dumps(line))


if __name__ == "__main__":
    run(main)
