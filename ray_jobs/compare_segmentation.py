"""Train several segmentation configurations, each with several seeds, and write their table with intervals."""

import argparse
from pathlib import Path

from evaluation.segmentation import Trial, load_trial, rows, write
from models.registry import EXPERIMENTS
from models.segmentation import data
from models.segmentation.config import SegmentationConfig
from models.segmentation.train import fingerprint, train
from ops.configuration import load
from ops.environment import Environment
from ops.jobs import ray_session, run


def main() -> dict[str, object]:
    """Run what has not been run yet; results of finished trainings are kept in the output folder."""
    arguments = _arguments()
    environment = Environment.read()
    environment.export()
    output = (arguments.output or environment.home / "reports" / "segmentation").absolute()
    asked = [
        (path.stem, _config(path, arguments.overrides, seed)) for path in arguments.configs for seed in arguments.seeds
    ]
    with ray_session():
        trials = [_trial(name, config, environment, output) for name, config in asked]
    result = write(trials, output)
    return {"report": str(output / "experiments.md"), **result}


def _config(path: Path, overrides: list[str], seed: int) -> SegmentationConfig:
    """A configuration with the seed of its split and training; its models aren't those that are served."""
    config = load(SegmentationConfig, path, [*overrides, f"train.seed={seed}", f"data.seed={seed}"])
    return config.model_copy(update={"registered_name": f"{config.registered_name}{EXPERIMENTS}"})


def _trial(name: str, config: SegmentationConfig, environment: Environment, output: Path) -> Trial:
    found = data.splits(config.data, environment.data)
    key = f"{fingerprint(config, found)} {config.predict.model_dump_json()}"
    path = output / "trials" / f"{name}-{config.train.seed}.json"
    if (known := load_trial(path, key)) is not None:
        return known
    outcome = train(config, found, home=environment.home, tracking_uri=environment.tracking_uri)
    made = found.source == "phantoms"
    trial = Trial(
        experiment=name,
        change=config.change,
        seed=config.train.seed,
        key=key,
        split_hash=found.hash,
        validation_dice=float(outcome.fit.metrics["dice"]),
        validation_iou=float(outcome.fit.metrics["iou"]),
        threshold=outcome.predictor.threshold,
        peak=outcome.predictor.peak,
        parameters=sum(parameter.numel() for parameter in outcome.predictor.network.parameters()),
        seconds=round(outcome.fit.seconds, 1),
        rule_name=outcome.rule,
        rows=rows(found.test, outcome.masks, outcome.rule_masks, f"{found.hash}-" if made else ""),
    )
    trial.save(path)
    return trial


def _arguments() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("configs", nargs="+", type=Path, help="YAML files, in the order of the table")
    arguments.add_argument("--seeds", type=_seeds, default=(0,), help="comma-separated; of split and training (0)")
    arguments.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    arguments.add_argument("--output", type=Path, help="folder (default MILLRACE_HOME/reports/segmentation)")
    return arguments.parse_args()


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    run(main)
