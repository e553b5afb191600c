"""How well a mask fits the truth, and the thresholds that a network has to beat.

Empty masks: where truth and prediction are both empty, Dice, IoU, precision and recall are 1 and the Hausdorff distance
is 0; where one of them is empty, all four are 0 and the distance is the diagonal of the image, the largest there is.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter, label
from skimage import filters

from models.segmentation.scans import Image, Mask, Scan

METRICS = ("dice", "iou", "precision", "recall", "hausdorff95_px")
RULES = ("otsu", "li", "triangle", "yen", "isodata", "percentile")
_DARKEST = 0.12


def score(prediction: Mask, truth: Mask) -> dict[str, float]:
    """Every metric of one image, by name; the Hausdorff distance in pixels."""
    return overlap(prediction, truth) | {"hausdorff95_px": hausdorff95(prediction, truth)}


def overlap(prediction: Mask, truth: Mask) -> dict[str, float]:
    """Dice, IoU, precision and recall of one image."""
    both, said, true = int((prediction & truth).sum()), int(prediction.sum()), int(truth.sum())
    if not said or not true:
        value = float(said == true)
        return {"dice": value, "iou": value, "precision": value, "recall": value}
    return {
        "dice": 2 * both / (said + true),
        "iou": both / (said + true - both),
        "precision": both / said,
        "recall": both / true,
    }


def hausdorff95(prediction: Mask, truth: Mask) -> float:
    """The 95th percentile of the distances from each border to the other, both ways together, in pixels."""
    if not prediction.any() or not truth.any():
        return 0.0 if prediction.any() == truth.any() else float(np.hypot(*truth.shape))
    borders = [mask & ~binary_erosion(mask) for mask in (prediction, truth)]
    away = [distance_transform_edt(~border) for border in borders]
    return float(np.percentile(np.concatenate([away[1][borders[0]], away[0][borders[1]]]), 95))


def mean_scores(predictions: Sequence[Mask], scans: Sequence[Scan]) -> dict[str, float]:
    """The mean of every metric over images, and Dice of each kind of scan as `dice_<kind>`."""
    rows = [score(prediction, scan.mask) for prediction, scan in zip(predictions, scans, strict=True)]
    found = {name: float(np.mean([row[name] for row in rows])) for name in METRICS}
    for kind in sorted({scan.kind for scan in scans}):
        of_kind = [row["dice"] for row, scan in zip(rows, scans, strict=True) if scan.kind == kind]
        found[f"dice_{kind}"] = float(np.mean(of_kind))
    return found


def threshold_mask(image: Image, rule: str) -> Mask:
    """The largest dark spot that doesn't touch the border, by one rule of `RULES`; what anybody tries first.

    The image is smoothed against speckle, and what is darker than the rule's threshold is cut into connected spots.
    """
    smooth = gaussian_filter(image, 0.02 * max(image.shape))
    if smooth.min() == smooth.max():
        return np.zeros(image.shape, bool)
    limit = np.quantile(smooth, _DARKEST) if rule == "percentile" else _THRESHOLDS[rule](smooth)
    spots, count = label(smooth < limit)
    border = np.unique(np.concatenate([spots[0], spots[-1], spots[:, 0], spots[:, -1]]))
    sizes: NDArray[np.int64] = np.bincount(spots.ravel(), minlength=count + 1)
    sizes[0] = 0
    inner = sizes.copy()
    inner[border] = 0
    best = int(np.argmax(inner if inner.any() else sizes))
    return np.asarray(spots == best) if sizes[best] else np.zeros(image.shape, bool)


def best_rule(scans: Sequence[Scan]) -> tuple[str, Mapping[str, float]]:
    """The rule with the largest mean Dice on these scans, and the mean Dice of every rule."""
    found = {
        rule: float(np.mean([overlap(threshold_mask(scan.image, rule), scan.mask)["dice"] for scan in scans]))
        for rule in RULES
    }
    return max(found, key=lambda rule: found[rule]), found


_THRESHOLDS: Mapping[str, Callable[[Image], float]] = {
    "otsu": filters.threshold_otsu,
    "li": filters.threshold_li,
    "triangle": filters.threshold_triangle,
    "yen": filters.threshold_yen,
    "isodata": filters.threshold_isodata,
}
