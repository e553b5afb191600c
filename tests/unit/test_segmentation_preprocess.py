"""Resizing there and back, normalising, and augmentations that move image and mask alike."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.segmentation.config import AugmentConfig, PreprocessConfig
from models.segmentation.phantoms import phantom
from models.segmentation.preprocess import augment, normalise, prepare, prepare_mask, restore

STILL = AugmentConfig(flip=False, rotate_deg=0, scale=0, shift=0, gain=0, gamma=0, speckle=0)


@given(st.integers(8, 90), st.integers(8, 90), st.sampled_from(["stretch", "pad"]))
@settings(max_examples=40, deadline=None)
def test_a_mask_comes_back_to_its_place(height, width, resize):
    config = PreprocessConfig(size_px=64, resize=resize)
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = True
    small = prepare_mask(mask, config)
    back = restore(small.astype(np.float32), mask.shape, config) >= 0.5
    assert small.shape == (64, 64) and back.shape == mask.shape
    away = np.argwhere(back != mask)
    edges_y, edges_x = (height // 4, height * 3 // 4), (width // 4, width * 3 // 4)
    slack_y, slack_x = (1 + height / 64, 1 + width / 64) if resize == "stretch" else (1 + max(height, width) / 64,) * 2
    for y, x in away:
        assert min(abs(y - e) for e in edges_y) <= slack_y + 1 or min(abs(x - e) for e in edges_x) <= slack_x + 1


def test_padding_keeps_the_proportions_and_stretching_does_not():
    disc = np.hypot(*np.mgrid[-20:20, -40:40]) < 15
    padded = prepare_mask(disc, PreprocessConfig(size_px=80, resize="pad"))
    stretched = prepare_mask(disc, PreprocessConfig(size_px=80))
    sides = [np.ptp(np.argwhere(mask), axis=0) for mask in (padded, stretched)]
    assert sides[0][0] == pytest.approx(sides[0][1], abs=1)
    assert sides[1][0] > 1.8 * sides[1][1]


def test_steps_run_in_their_order_before_resizing():
    image = phantom(0, 0, 0, 96).image
    steps = [{"name": "lee"}, {"name": "clahe"}]
    one, other, none = (
        prepare(image, PreprocessConfig.model_validate({"steps": given_steps, "size_px": 48}))
        for given_steps in (steps, steps[::-1], [])
    )
    assert one.shape == (48, 48)
    assert not np.allclose(one, other) and not np.allclose(one, none)


@pytest.mark.parametrize("how", ["none", "zscore", "minmax"])
def test_normalising(how):
    config = PreprocessConfig(normalise=how)
    image = phantom(0, 0, 0, 96).image
    found = normalise(image, config)
    assert found.dtype == np.float32
    if how == "none":
        assert np.array_equal(found, image)
    elif how == "zscore":
        assert (found.mean(), found.std()) == pytest.approx((0, 1), abs=1e-4)
        assert np.allclose(found, normalise(image * np.float32(0.5), config), atol=1e-4)
    else:
        assert (found.min(), found.max()) == pytest.approx((0, 1), abs=1e-6)
    assert np.isfinite(normalise(np.zeros((4, 4), np.float32), config)).all()


def test_without_any_change_nothing_changes():
    made = phantom(0, 0, 0, 96)
    image, mask = augment(made.image, made.mask, STILL, np.random.default_rng(0))
    assert image == pytest.approx(made.image, abs=1e-6)
    assert np.array_equal(mask, made.mask)


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_image_and_mask_move_together(seed):
    """An image that is its mask still is, and up stays up."""
    mask = np.zeros((64, 64), bool)
    mask[20:28, 16:48] = True
    moving = AugmentConfig(gain=0, gamma=0, speckle=0)
    image, moved = augment(mask.astype(np.float32), mask, moving, np.random.default_rng(seed))
    assert np.mean((image >= 0.5) != moved) < 0.001
    assert np.argwhere(moved)[:, 0].mean() < 36  # 32 is the middle: it was above, and no flip turns it over
    assert 0.6 < moved.sum() / mask.sum() < 1.5


def test_flipping_happens_every_other_time_and_is_left_to_right():
    ramp = np.tile(np.linspace(0, 1, 32, dtype=np.float32), (32, 1))
    ramp[0] = 0
    only_flip = STILL.model_copy(update={"flip": True})
    found = [augment(ramp, ramp > 2, only_flip, np.random.default_rng(seed))[0] for seed in range(200)]
    flipped = sum(np.allclose(one, ramp[:, ::-1], atol=1e-5) for one in found)
    assert flipped + sum(np.allclose(one, ramp, atol=1e-5) for one in found) == 200
    assert 70 < flipped < 130


def test_brightness_and_speckle_leave_the_mask_alone():
    made = phantom(0, 0, 0, 96)
    config = STILL.model_copy(update={"gain": 0.3, "gamma": 0.4, "speckle": 0.1})
    image, mask = augment(made.image, made.mask, config, np.random.default_rng(1))
    assert np.array_equal(mask, made.mask)
    assert not np.allclose(image, made.image, atol=0.02)
    assert 0 <= image.min() and image.max() <= 1
    assert np.corrcoef(image.ravel(), made.image.ravel())[0, 1] > 0.9
