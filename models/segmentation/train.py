"""Trains a U-Net on the configured scans, measures it against the best threshold rule, and registers it."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models import trainer
from models.runs import Run, flatten
from models.segmentation import figures, predict
from models.segmentation.config import PredictConfig, SegmentationConfig
from models.segmentation.data import Splits, training_number, training_scan
from models.segmentation.network import UNet, segmentation_loss
from models.segmentation.predict import SegmentationPredictor
from models.segmentation.preprocess import augment, normalise, prepare, prepare_mask
from models.segmentation.scans import Image, Mask, Scan
from models.segmentation.scores import best_rule, mean_scores, overlap, threshold_mask
from models.training_run import training_run

logger = logging.getLogger(__name__)

THRESHOLDS = tuple(round(0.1 + 0.05 * step, 2) for step in range(17))
PEAKS = (0.0, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
MEASURED = 40
"""Training images on which Dice is measured beside the validation split, and on which the threshold rule is chosen."""


@dataclass(frozen=True)
class SegmentationTask:
    """What `models.trainer` trains: real scans and phantoms, augmented anew in every epoch, validated by Dice."""

    config: SegmentationConfig
    real: tuple[Scan, ...]
    validation: tuple[Scan, ...]

    primary = "dice"
    higher_is_better = True

    @property
    def size(self) -> int:
        """Images of an epoch."""
        return len(self.real) + self.config.data.phantoms

    def build(self) -> nn.Module:
        """The network to train."""
        return predict.build(self.config.network)

    def batch(self, samples: Sequence[trainer.Sample]) -> Mapping[str, Tensor]:
        """`image` and `truth`, both float32[B, 1, S, S]."""
        images, truths = [], []
        for epoch, index in samples:
            rng = np.random.default_rng([self.config.train.seed, epoch, index])
            image, mask = augment(*self._prepared(epoch, index), self.config.augment, rng)
            images.append(normalise(image, self.config.preprocess))
            truths.append(mask.astype(np.float32))
        return {
            "image": torch.from_numpy(np.stack(images)[:, None]),
            "truth": torch.from_numpy(np.stack(truths)[:, None]),
        }

    def loss(self, network: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """The sum of the images' losses, and how many images there are."""
        losses = segmentation_loss(network(batch["image"]), batch["truth"], self.config.loss.dice, self.config.loss.bce)
        return losses.sum(), len(losses)

    def validate(self, network: nn.Module, rank: int, world_size: int) -> Mapping[str, tuple[float, float]]:
        """Dice and IoU of one rank's share of the validation split and of some training images, at its own size."""
        predictor = self.predictor(network)
        found: dict[str, tuple[float, float]] = {}
        count = min(MEASURED, self.size)
        parts = {"": self._held_out[rank::world_size], "train_": self._measured(count)[rank::world_size]}
        for prefix, part in parts.items():
            probabilities = predictor.probabilities([image for image, _ in part])
            rows = [overlap(one >= 0.5, mask) for one, (_, mask) in zip(probabilities, part, strict=True)]
            for name in ("dice", "iou"):
                found[prefix + name] = (sum(row[name] for row in rows), float(len(rows)))
        return found

    def predictor(self, network: nn.Module) -> SegmentationPredictor:
        """The network as it is used after training, at threshold .5 until limits are chosen."""
        if not isinstance(network, UNet):
            raise TypeError(f"{type(network).__name__} is no UNet")
        device = str(next(network.parameters()).device)
        config = self.config
        return SegmentationPredictor(
            network, config.network, config.preprocess, flip=config.predict.flip, device=device
        )

    def training_images(self, count: int) -> list[Image]:
        """The first prepared images of training, as they are before augmentation."""
        return [image for image, _ in self._measured(min(count, self.size))]

    @cached_property
    def _cache(self) -> dict[tuple[str, int], tuple[Image, Mask]]:
        return {}

    @cached_property
    def _held_out(self) -> list[tuple[Image, Mask]]:
        return [self._ready(scan) for scan in self.validation]

    def _measured(self, count: int) -> list[tuple[Image, Mask]]:
        """Training images spread over the whole of an epoch that has real ones."""
        epoch = self.config.data.phantom_epochs
        return [self._prepared(epoch, int(index)) for index in np.linspace(0, self.size - 1, count).round()]

    def _prepared(self, epoch: int, index: int) -> tuple[Image, Mask]:
        """The image of a sample before augmentation, kept where it is the same in every epoch."""
        number = training_number(self.config.data, len(self.real), epoch, index)
        key = ("real", index) if number is None else ("phantom", number)
        if key in self._cache:
            return self._cache[key]
        ready = self._ready(training_scan(self.config.data, self.real, epoch, index))
        if number is None or not self.config.data.fresh_phantoms:
            self._cache[key] = ready
        return ready

    def _ready(self, scan: Scan) -> tuple[Image, Mask]:
        config = self.config.preprocess
        return prepare(scan.image, config), prepare_mask(scan.mask, config)


@dataclass(frozen=True)
class Outcome:
    """What a training gave: the job's result, and the masks of the test split by the network and by the best rule."""

    result: Mapping[str, object]
    fit: trainer.Fit
    predictor: SegmentationPredictor
    task: SegmentationTask
    masks: tuple[Mask, ...]
    rule: str
    rule_masks: tuple[Mask, ...]


def train(config: SegmentationConfig, found: Splits, *, home: Path, tracking_uri: str) -> Outcome:
    """Train, measure on the test split, draw, register.

    An unfinished run of the same name goes on. Ray must be initialised.

    Raises:
        RunError: the name is in use or belongs to another configuration.
    """
    task = SegmentationTask(config, found.train, found.validation)
    config_hash, parameters = fingerprint(config, found), _parameters(config, found)
    with training_run(config.registered_name, config.train, config_hash, parameters, home, tracking_uri) as training:
        fitted = training.fit(task)
        predictor = task.predictor(trainer.trained(task, fitted.weights))
        predictor.threshold, predictor.peak = chosen_limits(predictor, found.validation, config.predict)
        masks = tuple(one.mask for one in predictor.segment([scan.image for scan in found.test]))
        scores = mean_scores(masks, found.test)
        rule, rule_masks = threshold_masks(config, found)
        rule_scores = mean_scores(rule_masks, found.test)
        training.run.log_metrics({f"test_{key}": value for key, value in scores.items()}, fitted.steps)
        training.run.log_metrics({f"test_rule_{key}": value for key, value in rule_scores.items()}, fitted.steps)
        _draw(training.run, tracking_uri, predictor, found, config.predict.panels)
        tags = {"task": "segmentation", "split_hash": found.hash, "source": found.source}
        tags |= {key: f"{value:.6f}" for key, value in scores.items()}
        entered = training.enter(training.register("model", predictor.save, tags), fitted)
    result = {
        **{key: round(value, 4) for key, value in scores.items()},
        "validation_dice": round(fitted.metrics["dice"], 4),
        "validation_iou": round(fitted.metrics["iou"], 4),
        "rule": rule,
        "rule_dice": round(rule_scores["dice"], 4),
        "threshold": predictor.threshold,
        "peak": predictor.peak,
        **entered,
        "source": found.source,
        "images": {"train": task.size, "validation": len(found.validation), "test": len(found.test)},
        "skipped": found.skipped,
        "parameters": sum(parameter.numel() for parameter in predictor.network.parameters()),
    }
    return Outcome(result, fitted, predictor, task, masks, rule, tuple(rule_masks))


def sample_scores(found: Splits, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Dice and IoU of each scan of the test split as (value, 1), by the model in a folder."""
    masks = [one.mask for one in predict.load(folder).segment([scan.image for scan in found.test])]
    rows = [overlap(mask, scan.mask) for mask, scan in zip(masks, found.test, strict=True)]
    return {name: [(row[name], 1.0) for row in rows] for name in ("dice", "iou")}


def chosen_limits(
    predictor: SegmentationPredictor, scans: Sequence[Scan], config: PredictConfig
) -> tuple[float, float]:
    """Threshold and peak: the configured ones, or those with the best mean Dice on these scans."""
    thresholds = THRESHOLDS if config.threshold == "validation" else (float(config.threshold),)
    peaks = PEAKS if config.peak == "validation" else (float(config.peak),)
    if len(thresholds) == len(peaks) == 1:
        return thresholds[0], peaks[0]
    found = predictor.segment([scan.image for scan in scans])

    def goodness(limits: tuple[float, float]) -> tuple[float, float, float]:
        pairs = zip(found, scans, strict=True)
        each = [overlap(predict.spots(one.probability, *limits), scan.mask)["dice"] for one, scan in pairs]
        return round(float(np.mean(each)), 6), -abs(limits[0] - 0.5), -limits[1]

    return max(((threshold, peak) for threshold in thresholds for peak in peaks), key=goodness)


def threshold_masks(config: SegmentationConfig, found: Splits) -> tuple[str, list[Mask]]:
    """The rule that is best on scans outside the test split, and its masks of the test split."""
    phantoms = [training_scan(config.data, (), 0, index) for index in range(min(MEASURED, config.data.phantoms))]
    rule, _ = best_rule([*found.train, *found.validation] if found.train else [*phantoms, *found.validation])
    return rule, [threshold_mask(scan.image, rule) for scan in found.test]


def _draw(run: Run, tracking_uri: str, predictor: SegmentationPredictor, found: Splits, panels: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for path in (
            figures.learning_curves(tracking_uri, run.id, Path(scratch) / "learning_curves.png"),
            figures.panels(predictor, found.test, panels, Path(scratch) / "predictions.png"),
        ):
            if path is not None:
                run.log_file(path, "figures")


def fingerprint(config: SegmentationConfig, found: Splits) -> str:
    """A hash of what decides the weights: data, network and recipe, but not how the work is scheduled."""
    deciding = config.model_dump(
        mode="json",
        exclude={
            "predict": True,
            "export": True,
            "registered_name": True,
            "change": True,
            "train": set(trainer.SCHEDULING),
        },
    )
    total = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode())
    for scan in (*found.train, *found.validation, *found.test):
        total.update(f"{scan.id}\0".encode())
        total.update(np.ascontiguousarray(scan.image).tobytes())
        total.update(scan.mask.tobytes())
    return total.hexdigest()


def _parameters(config: SegmentationConfig, found: Splits) -> dict[str, object]:
    counts = {"train": len(found.train), "validation": len(found.validation), "test": len(found.test)}
    return (
        flatten(config.model_dump(mode="json"))
        | {f"data.{part}_count": count for part, count in counts.items()}
        | {"data.hash": found.hash, "data.skipped": found.skipped}
    )
