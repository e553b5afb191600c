"""Filters against loops over pixels, and against what they are for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.segmentation.config import Clahe, Frost, Kuan, Lee, NonLocalMeans
from models.segmentation.filters import apply, frost, kuan, lee, noise_deviation

IMAGES = arrays(np.float32, st.tuples(st.integers(5, 9), st.integers(5, 9)), elements=st.floats(0, 1, width=16))


def windows(image, window):
    """Every pixel with the square round it, the image mirrored at its borders."""
    half = window // 2
    padded = np.pad(image.astype(np.float64), half, mode="symmetric")
    for y, x in np.ndindex(*image.shape):
        yield (y, x), padded[y : y + window, x : x + window]


def variation2(block):
    return block.var() / max(block.mean() ** 2, 1e-12)


@given(IMAGES, st.sampled_from([3, 5]), st.floats(0.05, 1), st.booleans())
@settings(max_examples=40, deadline=None)
def test_lee_and_kuan_are_the_loop_over_pixels(image, window, noise, exact):
    expected = np.empty(image.shape)
    for place, block in windows(image, window):
        weight = 1 - noise**2 / max(variation2(block), 1e-12)
        if exact:
            weight /= 1 + noise**2
        expected[place] = block.mean() + np.clip(weight, 0, 1) * (image[place] - block.mean())
    assert (kuan if exact else lee)(image, window, noise) == pytest.approx(expected, abs=1e-5)


@given(IMAGES, st.sampled_from([3, 5]), st.floats(0.1, 5))
@settings(max_examples=40, deadline=None)
def test_frost_is_the_loop_over_pixels(image, window, damping):
    half = window // 2
    away = np.hypot(*np.mgrid[-half : half + 1, -half : half + 1])
    expected = np.empty(image.shape)
    for place, block in windows(image, window):
        weights = np.exp(-damping * variation2(block) * away)
        expected[place] = (weights * block).sum() / weights.sum()
    assert frost(image, window, damping) == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def speckled():
    """Two halves, .3 and .7, and the same under multiplicative noise."""
    clean = np.full((64, 64), 0.3, np.float32)
    clean[:, 32:] = 0.7
    noise = np.random.default_rng(0).gamma(25, 1 / 25, clean.shape)
    return clean, np.clip(clean * noise, 0, 1).astype(np.float32)


@pytest.mark.parametrize("step", [Lee(name="lee"), Kuan(name="kuan"), Frost(name="frost"), NonLocalMeans(name="nlm")])
def test_every_filter_removes_speckle_and_keeps_the_edge(speckled, step):
    clean, noisy = speckled
    before = noisy.copy()
    found = apply(step, noisy)
    assert found.dtype == np.float32 and found.shape == noisy.shape
    assert np.array_equal(noisy, before)
    flat = np.s_[:, 4:28]
    assert np.std(found[flat]) < 0.6 * np.std(noisy[flat])
    assert np.mean((found - clean) ** 2) < 0.6 * np.mean((noisy - clean) ** 2)
    assert found[:, 35:].mean() - found[:, :29].mean() > 0.37


def test_a_plain_window_would_blur_the_edge_more(speckled):
    from scipy.ndimage import uniform_filter

    clean, noisy = speckled
    edge = np.s_[:, 30:34]
    plain = np.mean((uniform_filter(noisy, 5) - clean)[edge] ** 2)
    for name in (lee, kuan):
        assert np.mean((name(noisy, 5, 0.2) - clean)[edge] ** 2) < 0.8 * plain


def test_the_noise_is_estimated():
    image = np.tile(np.linspace(0.2, 0.8, 200), (200, 1)) + np.random.default_rng(0).normal(0, 0.05, (200, 200))
    assert noise_deviation(image.astype(np.float32)) == pytest.approx(0.05, rel=0.05)


def test_clahe_spreads_a_narrow_range_and_stays_within_0_and_1(speckled):
    _, noisy = speckled
    narrow = (0.4 + 0.1 * noisy).astype(np.float32)
    found = apply(Clahe(name="clahe", clip=0.05), narrow)
    assert found.std() > 1.5 * narrow.std()
    assert 0 <= found.min() and found.max() <= 1


@pytest.mark.parametrize(
    "step", [Lee(name="lee"), Kuan(name="kuan"), Frost(name="frost"), NonLocalMeans(name="nlm"), Clahe(name="clahe")]
)
@pytest.mark.parametrize("grey", [0.0, 0.5])
def test_an_image_of_one_grey_stays_finite(step, grey):
    found = apply(step, np.full((20, 30), grey, np.float32))
    assert np.isfinite(found).all() and found.shape == (20, 30)
