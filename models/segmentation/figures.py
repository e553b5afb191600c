"""Pictures of a training: curves over the epochs, and what the network finds beside the truth."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from mlflow import MlflowClient
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion

from models.segmentation.predict import SegmentationPredictor
from models.segmentation.scans import Image, Mask, Scan

_CURVES = (
    ("loss", {"train_loss": "training"}),
    ("Dice", {"validation_train_dice": "training", "validation_dice": "validation"}),
    ("IoU", {"validation_train_iou": "training", "validation_iou": "validation"}),
)
_TRUTH, _FOUND = "#2ca02c", "#d62728"


def learning_curves(tracking_uri: str, run_id: str, path: Path) -> Path:
    """Draw loss, Dice and IoU over the steps of an MLflow run."""
    client = MlflowClient(tracking_uri=tracking_uri)
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(_CURVES)), _CURVES, strict=True):
        for metric, label in curves.items():
            history = client.get_metric_history(run_id, metric)
            axes.plot([one.step for one in history], [one.value for one in history], marker=".", label=label)
        axes.set(title=title, xlabel="step")
        axes.legend()
    figure.savefig(path, dpi=90)
    return path


def panels(predictor: SegmentationPredictor, scans: Sequence[Scan], count: int, path: Path) -> Path | None:
    """Draw image, truth, prediction and overlay of some scans, evenly chosen; None for none."""
    if not count or not scans:
        return None
    places = sorted({int(place) for place in np.linspace(0, len(scans) - 1, min(count, len(scans))).round()})
    chosen = [scans[place] for place in places]
    found = predictor.segment([scan.image for scan in chosen])
    figure = Figure(figsize=(10, 2.6 * len(chosen)), layout="constrained")
    grid = figure.subplots(len(chosen), 4, squeeze=False)
    for row, scan, one in zip(grid, chosen, found, strict=True):
        row[0].imshow(scan.image, cmap="gray", vmin=0, vmax=1)
        row[1].imshow(scan.mask, cmap="gray", vmin=0, vmax=1)
        row[2].imshow(one.probability, cmap="magma", vmin=0, vmax=1)
        row[3].imshow(scan.image, cmap="gray", vmin=0, vmax=1)
        for mask, colour in ((scan.mask, _TRUTH), (one.mask, _FOUND)):
            if mask.any() and not mask.all():
                row[3].contour(mask, [0.5], colors=colour, linewidths=1)
        for axes, title in zip(row, (scan.id, "truth", "probability", "truth green, found red"), strict=True):
            axes.set_title(title, fontsize=8)
            axes.set_axis_off()
    figure.savefig(path, dpi=80)
    return path


def overlay(image: Image, mask: Mask) -> NDArray[np.uint8]:
    """The grey image as colours uint8[H, W, 3], with the border of the mask in red."""
    colours = np.repeat((image * 255).astype(np.uint8)[..., None], 3, axis=2)
    colours[mask & ~binary_erosion(mask)] = (214, 39, 40)
    return colours
