import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from fetal_flax.config import AugmentationConfig
from fetal_flax.data.photometric import UNCHANGED, Photometric, apply_photometric, draw_photometric
from fetal_flax.data.samples import draw_transform

pytestmark = pytest.mark.usefixtures("quick_compilation")

EVERYTHING = AugmentationConfig(
    gain=0.3, gamma=0.5, blur_px=1.5, speckle=0.2, shadow=0.6, photometric_probability=1.0
)


@pytest.fixture
def images() -> jax.Array:
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.uniform(size=(2, 48, 64, 1)), (0, 1, 1, 0))
    return jnp.asarray(0.3 + 0.4 * smooth, jnp.float32)


def varied(images: jax.Array, **parts) -> np.ndarray:
    """Applies the given parts to both images."""
    both = {name: np.full(2, value, np.float32) for name, value in parts.items()}
    whole = jax.tree.map(lambda value: np.full(2, value), UNCHANGED)._replace(**both)
    return np.asarray(apply_photometric(images, whole, EVERYTHING))


def test_unchanged_changes_no_more_than_rounding(images):
    np.testing.assert_allclose(varied(images), images, rtol=1e-6)


def test_gain_and_gamma_are_a_factor_and_a_power(images):
    np.testing.assert_allclose(varied(images, gain=0.8), 0.8 * images, rtol=1e-6)
    np.testing.assert_allclose(varied(images, gamma=1.4), np.asarray(images) ** 1.4, rtol=1e-5)


def test_grey_levels_stay_in_range(images):
    result = varied(3 * images, gain=1.3, speckle=0.2)
    assert result.min() >= 0 and result.max() == 1


def test_the_blur_is_a_gaussian(images):
    theirs = ndimage.gaussian_filter(
        np.asarray(images, np.float64), (0, 1.2, 1.2, 0), mode="nearest", radius=3
    )
    np.testing.assert_allclose(varied(images, blur_px=1.2), theirs, atol=1e-6)


def test_speckle_is_multiplicative_noise_of_its_seed(images):
    result = varied(images, speckle=0.1)
    ratio = result / np.asarray(images) - 1
    assert ratio.std() == pytest.approx(0.1, rel=0.05) and abs(ratio.mean()) < 5e-3
    np.testing.assert_array_equal(ratio[0] != 0, ratio[1] != 0)
    # The same seed gives the same noise, another seed another.
    np.testing.assert_allclose(ratio[0], ratio[1], atol=1e-5)
    seeds = Photometric(*(np.full(2, value) for value in UNCHANGED))._replace(
        speckle=np.full(2, 0.1, np.float32), speckle_seed=np.array([1, 2], np.uint32)
    )
    other = np.asarray(apply_photometric(images, seeds, EVERYTHING)) / np.asarray(images) - 1
    assert abs(np.corrcoef(other[0].ravel(), other[1].ravel())[0, 1]) < 0.05


def test_a_shadow_is_darkest_in_its_middle(images):
    result = varied(images, shadow=0.6, shadow_x=0.5, shadow_slope=0.25, shadow_width=0.05)
    kept = (result / np.asarray(images))[0, :, :, 0]
    assert kept.min() == pytest.approx(0.4, abs=0.02)
    assert abs(kept[0].argmin() - 0.5 * 63) <= 1 and abs(kept[-1].argmin() - 0.75 * 63) <= 1
    assert kept[0, 0] == pytest.approx(1, abs=1e-4)


def test_draws_stay_in_their_ranges_and_vary():
    rng = np.random.default_rng(0)
    drawn = [draw_photometric(EVERYTHING, rng) for _ in range(500)]
    ranges = {
        "gain": (0.7, 1.3),
        "gamma": (1 / 1.5, 1.5),
        "blur_px": (0, 1.5),
        "speckle": (0, 0.2),
        "shadow": (0, 0.6),
    }
    for name, (low, high) in ranges.items():
        values = np.array([getattr(parts, name) for parts in drawn])
        assert low - 1e-6 <= values.min() and values.max() <= high + 1e-6
        assert values.min() < low + 0.05 * (high - low) and values.max() > high - 0.05 * (
            high - low
        )
    assert len({int(parts.speckle_seed) for parts in drawn}) == 500


def test_a_part_is_drawn_alike_whatever_the_others_ranges_and_probability():
    often, seldom = (
        draw_photometric(
            dataclasses.replace(EVERYTHING, photometric_probability=p), np.random.default_rng(5)
        )
        for p in (1.0, 0.5)
    )
    changed = [
        name
        for name, ours, theirs, still in zip(
            Photometric._fields, often, seldom, UNCHANGED, strict=True
        )
        if ours != theirs and theirs != still
    ]
    assert not changed


def test_grey_levels_leave_the_geometry_as_it_was():
    for seed in range(20):
        geometry, both = (
            draw_transform(config, np.random.default_rng(seed))
            for config in (AugmentationConfig(), EVERYTHING)
        )
        assert dataclasses.replace(both, photometric=UNCHANGED) == geometry


def test_nothing_is_drawn_without_a_range():
    assert not AugmentationConfig().photometric
    assert not dataclasses.replace(EVERYTHING, enabled=False).photometric
    transform = draw_transform(AugmentationConfig(), np.random.default_rng(0))
    assert transform.photometric is UNCHANGED
