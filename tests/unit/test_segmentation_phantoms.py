"""Procedural ultrasound images: decided by their number, and like ultrasound where it matters."""

import numpy as np
import pytest
from scipy.ndimage import label
from scipy.stats import kstest, norm, rayleigh

from models.segmentation.config import DataConfig
from models.segmentation.data import TEST, TRAIN, VALIDATION, phantoms, splits, training_scan
from models.segmentation.phantoms import phantom


@pytest.fixture(scope="module")
def made():
    return [phantom(7, 0, number, 96) for number in range(60)]


def test_a_number_decides_its_phantom_and_nothing_else_does(made):
    np.random.seed(3)
    again = phantom(7, 0, 11, 96)
    assert np.array_equal(again.image, made[11].image)
    assert np.array_equal(again.mask, made[11].mask)
    assert not np.array_equal(phantom(8, 0, 11, 96).image, made[11].image)
    assert not np.array_equal(phantom(7, 1, 11, 96).image, made[11].image)


def test_only_normal_phantoms_have_empty_masks(made):
    assert {one.kind for one in made} == {"benign", "malignant", "normal"}
    for one in made:
        assert one.mask.any() == (one.kind != "normal")
        assert one.image.shape == one.mask.shape == (96, 96)
        assert 0 <= one.image.min() and one.image.max() <= 1
        assert one.mask.mean() < 0.4
        assert label(one.mask, structure=np.ones((3, 3)))[1] <= 1 or one.kind == "malignant"


def test_malignant_lesions_are_spiculated(made):
    def roughness(mask):
        edge = mask & ~(np.roll(mask, 1, 0) & np.roll(mask, -1, 0) & np.roll(mask, 1, 1) & np.roll(mask, -1, 1))
        return edge.sum() ** 2 / mask.sum()

    by_kind = {
        kind: np.median([roughness(one.mask) for one in made if one.kind == kind]) for kind in ("benign", "malignant")
    }
    assert by_kind["malignant"] > 1.2 * by_kind["benign"]


def test_lesions_are_darker_than_what_is_round_them_and_depth_fades(made):
    inside = np.mean([one.image[one.mask].mean() for one in made if one.mask.any()])
    outside = np.mean([one.image[~one.mask].mean() for one in made if one.mask.any()])
    assert inside < outside - 0.1
    normal = np.mean([one.image for one in made if one.kind == "normal"], axis=0)
    assert normal[70:].mean() < normal[10:40].mean() - 0.05


def test_speckle_is_rayleigh():
    from models.segmentation.phantoms import _speckle

    apart = _speckle(np.random.default_rng(0), 480)[::24, ::24].ravel()  # further apart than they are correlated
    scale = np.sqrt(2 / np.pi)  # that of a mean of 1
    assert kstest(apart, rayleigh(scale=scale).cdf).pvalue > 0.05
    assert apart.std() == pytest.approx(np.sqrt(4 / np.pi - 1), rel=0.05)
    assert kstest(np.abs(norm(1, apart.std()).rvs(2000, random_state=0)), rayleigh(scale=scale).cdf).pvalue < 0.05


def test_splits_of_phantoms_share_none():
    config = DataConfig(phantoms=5, validation_phantoms=4, test_phantoms=6)
    found = splits(config, None)
    assert (len(found.train), len(found.validation), len(found.test)) == (0, 4, 6)
    trained = phantoms(config, TRAIN, range(5))
    seen = [scan.image.tobytes() for scan in (*trained, *found.validation, *found.test)]
    assert len(set(seen)) == len(seen)
    assert found.hash == splits(config, None).hash
    assert found.hash != splits(config.model_copy(update={"seed": 1}), None).hash
    assert {VALIDATION, TEST, TRAIN} == {0, 1, 2}


def test_fresh_phantoms_are_new_in_every_epoch():
    config = DataConfig(phantoms=3, fresh_phantoms=True)
    real = phantoms(config, TEST, range(2))
    assert training_scan(config, real, 5, 1) is real[1]
    ids = [training_scan(config, real, epoch, index).id for epoch in range(3) for index in range(2, 5)]
    assert len(set(ids)) == 9
    fixed = config.model_copy(update={"fresh_phantoms": False})
    assert training_scan(fixed, real, 0, 3).id == training_scan(fixed, real, 4, 3).id


def test_real_scans_come_after_the_epochs_of_phantoms():
    config = DataConfig(phantoms=3, fresh_phantoms=True, phantom_epochs=2)
    real = phantoms(config, TEST, range(2))
    drawn = [[training_scan(config, real, epoch, index) for index in range(5)] for epoch in range(4)]
    known = {scan.id for scan in real}
    assert not any(scan.id in known for epoch in drawn[:2] for scan in epoch)
    assert all([scan.id for scan in epoch[:2]] == [scan.id for scan in real] for epoch in drawn[2:])
    made = [scan.id for epoch in drawn for scan in epoch if scan.id not in known]
    assert len(set(made)) == len(made) == 16
