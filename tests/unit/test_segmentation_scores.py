"""Metrics of masks against sets of pixels and all pairs of distances, and the threshold rules."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist
from skimage.metrics import hausdorff_distance

from models.segmentation.phantoms import phantom
from models.segmentation.scans import Scan
from models.segmentation.scores import RULES, best_rule, hausdorff95, mean_scores, overlap, score, threshold_mask

MASKS = arrays(bool, (9, 11))


def borders(mask):
    return np.argwhere(mask & ~binary_erosion(mask))


@given(MASKS, MASKS)
@settings(max_examples=150, deadline=None)
def test_overlap_is_that_of_sets_of_pixels(prediction, truth):
    said, true = ({tuple(place) for place in np.argwhere(mask)} for mask in (prediction, truth))
    found = overlap(prediction, truth)
    if said and true:
        assert found["dice"] == pytest.approx(2 * len(said & true) / (len(said) + len(true)))
        assert found["iou"] == pytest.approx(len(said & true) / len(said | true))
        assert found["precision"] == pytest.approx(len(said & true) / len(said))
        assert found["recall"] == pytest.approx(len(said & true) / len(true))
        assert found["iou"] == pytest.approx(found["dice"] / (2 - found["dice"]))
    assert found["dice"] == pytest.approx(overlap(truth, prediction)["dice"])


@given(MASKS, MASKS)
@settings(max_examples=150, deadline=None)
def test_hausdorff_is_that_of_all_pairs_of_border_pixels(prediction, truth):
    if not prediction.any() or not truth.any():
        return
    away = cdist(borders(prediction), borders(truth))
    both = np.concatenate([away.min(axis=1), away.min(axis=0)])
    assert hausdorff95(prediction, truth) == pytest.approx(np.percentile(both, 95))
    edges = [mask & ~binary_erosion(mask) for mask in (prediction, truth)]
    assert hausdorff95(prediction, truth) <= hausdorff_distance(*edges) + 1e-9


def test_empty_masks_follow_the_stated_convention():
    empty, some = np.zeros((30, 40), bool), np.zeros((30, 40), bool)
    some[3:6, 4:9] = True
    perfect = {"dice": 1.0, "iou": 1.0, "precision": 1.0, "recall": 1.0, "hausdorff95_px": 0.0}
    worst = {"dice": 0.0, "iou": 0.0, "precision": 0.0, "recall": 0.0, "hausdorff95_px": 50.0}
    assert score(empty, empty) == perfect
    assert score(some, some) == perfect
    assert score(some, empty) == score(empty, some) == worst


def test_means_are_over_images_and_kinds():
    image, full, empty = np.zeros((4, 4), np.float32), np.ones((4, 4), bool), np.zeros((4, 4), bool)
    scans = [Scan("a", image, full, "benign", "a"), Scan("b", image, empty, "normal", "b")]
    found = mean_scores([full, full], scans)
    assert (found["dice"], found["dice_benign"], found["dice_normal"]) == (0.5, 1.0, 0.0)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_finds_a_dark_spot_and_not_the_dark_border(rule):
    rng = np.random.default_rng(0)
    image = np.clip(rng.normal(0.7, 0.05, (80, 80)), 0, 1).astype(np.float32)
    truth = np.hypot(*(np.mgrid[:80, :80] - 40)) < 15
    image[truth] -= 0.5
    image[-2:] -= 0.5
    assert overlap(threshold_mask(image, rule), truth)["dice"] > 0.8


@pytest.mark.parametrize("rule", RULES)
def test_an_image_of_one_grey_has_no_spot(rule):
    assert not threshold_mask(np.full((20, 20), 0.5, np.float32), rule).any()


def test_the_best_rule_is_the_one_with_the_largest_mean():
    made = [phantom(0, 0, number, 96) for number in range(6)]
    scans = [Scan(str(n), one.image, one.mask, one.kind, str(n)) for n, one in enumerate(made)]
    rule, found = best_rule(scans)
    assert set(found) == set(RULES)
    assert found[rule] == max(found.values())
    masks = [threshold_mask(scan.image, rule) for scan in scans]
    assert mean_scores(masks, scans)["dice"] == pytest.approx(found[rule])
