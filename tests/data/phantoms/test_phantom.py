import math

import cv2
import numpy as np
import pytest

from fetal_flax.data.phantoms import Phantom, make_phantom
from fetal_flax.data.phantoms.geometry import (
    CEPHALIC_INDEX_RANGE,
    HEAD_CIRCUMFERENCE_RANGE_MM,
    PIXEL_SIZE_RANGE_MM,
    REFERENCE_WIDTH,
)
from fetal_flax.measurement.ellipse import Ellipse

SMALL = {"height": 128, "width": 192}


@pytest.fixture(scope="module")
def small_phantoms() -> list[Phantom]:
    return [make_phantom(0, index, **SMALL) for index in range(40)]


@pytest.fixture(scope="module")
def tiny_phantoms() -> list[Phantom]:
    return [make_phantom(5, index, height=54, width=80) for index in range(80)]


def inside(phantom: Phantom, shrink: float, grow: float = 0.0) -> np.ndarray:
    """Pixels between two copies of the ellipse, scaled by `grow` and `shrink`."""
    height, width = phantom.image.shape
    ellipse = phantom.ellipse

    def scaled(factor: float) -> np.ndarray:
        copy = Ellipse(
            ellipse.center_x,
            ellipse.center_y,
            ellipse.semi_major * factor,
            ellipse.semi_minor * factor,
            ellipse.angle,
        )
        return copy.filled(height, width) > 0

    return scaled(shrink) & ~scaled(grow) if grow else scaled(shrink)


def fits(phantom: Phantom) -> bool:
    directions = np.linspace(0.0, 2.0 * math.pi, 200)
    x, y = phantom.ellipse.points(np.cos(directions), np.sin(directions)).T
    height, width = phantom.image.shape
    return x.min() >= 0 and y.min() >= 0 and x.max() <= width - 1 and y.max() <= height - 1


@pytest.mark.parametrize("size", [(540, 800), (128, 192)])
def test_same_arguments_give_the_same_phantom(size):
    height, width = size
    first = make_phantom(3, 7, height=height, width=width)
    second = make_phantom(3, 7, height=height, width=width)
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.mask, second.mask)
    assert first.ellipse == second.ellipse
    assert first.pixel_size_mm == second.pixel_size_mm
    assert first.head_circumference_mm == second.head_circumference_mm


@pytest.mark.parametrize("other", [(3, 8), (4, 7)])
def test_other_seed_or_index_gives_another_phantom(other):
    first, second = make_phantom(3, 7, **SMALL), make_phantom(*other, **SMALL)
    assert first.ellipse != second.ellipse
    assert not np.array_equal(first.image, second.image)


@pytest.mark.parametrize("size", [(540, 800), (270, 400), (128, 192), (256, 256), (100, 300)])
def test_image_and_mask_have_the_size_asked_for(size):
    height, width = size
    phantom = make_phantom(0, 0, height=height, width=width)
    assert phantom.image.shape == phantom.mask.shape == size
    assert phantom.image.dtype == phantom.mask.dtype == np.uint8
    assert set(np.unique(phantom.mask)) == {0, 255}


def test_mask_area_is_that_of_the_ellipse():
    whole = [p for p in (make_phantom(1, i, height=270, width=400) for i in range(12)) if fits(p)]
    assert whole
    for phantom in whole:
        area = math.pi * phantom.ellipse.semi_major * phantom.ellipse.semi_minor
        assert np.count_nonzero(phantom.mask) == pytest.approx(area, rel=0.005)


def test_circumference_matches_numeric_integration():
    ellipse = Ellipse(10.0, -3.0, 210.0, 160.0, 0.7)
    directions = np.linspace(0.0, 2.0 * math.pi, 20001)
    points = ellipse.points(np.cos(directions), np.sin(directions))
    length = np.hypot(*np.diff(points, axis=0).T).sum()
    assert ellipse.circumference == pytest.approx(length, rel=1e-6)


def test_circumference_of_a_circle():
    assert Ellipse(0.0, 0.0, 5.0, 5.0, 0.0).circumference == pytest.approx(10.0 * math.pi)


def test_head_circumference_is_that_of_the_ellipse(small_phantoms):
    for phantom in small_phantoms:
        measured = phantom.ellipse.circumference * phantom.pixel_size_mm
        assert measured == pytest.approx(phantom.head_circumference_mm, rel=1e-9)


def test_filled_ellipse_follows_the_angle_convention():
    # An eighth of a turn sends the major axis towards the lower right: x right, y down.
    mask = Ellipse(50.0, 50.0, 40.0, 10.0, math.pi / 4).filled(101, 101)
    assert mask[70, 70] == 255
    assert mask[30, 70] == 0


@pytest.mark.parametrize("index", range(6))
def test_half_size_shows_the_same_anatomy(index):
    full = make_phantom(2, index)
    half = make_phantom(2, index, height=270, width=400)
    assert half.pixel_size_mm == pytest.approx(2.0 * full.pixel_size_mm)
    assert half.head_circumference_mm == full.head_circumference_mm
    reduced = cv2.resize(full.mask, (400, 270), interpolation=cv2.INTER_AREA) > 127
    intersection = np.count_nonzero(reduced & (half.mask > 0))
    union = np.count_nonzero(reduced | (half.mask > 0))
    assert intersection / union > 0.99
    # Without the speckle, the pictures agree too.
    blurred = [
        cv2.GaussianBlur(image.astype(np.float32), (0, 0), 6.0).ravel()
        for image in (half.image, cv2.resize(full.image, (400, 270), interpolation=cv2.INTER_AREA))
    ]
    assert np.asarray(np.corrcoef(blurred))[0, 1] > 0.95


def test_skull_is_brighter_than_the_brain(small_phantoms):
    differences = [
        phantom.image[inside(phantom, 0.99, 0.93)].mean()
        - phantom.image[inside(phantom, 0.85)].mean()
        for phantom in small_phantoms
    ]
    assert np.mean(differences) > 30.0
    assert np.mean(np.array(differences) > 0.0) > 0.95


def test_images_are_gray_on_a_black_screen(small_phantoms):
    images = np.stack([phantom.image for phantom in small_phantoms])
    assert 25.0 < images.mean() < 60.0
    assert 0.1 < np.mean(images < 5) < 0.5
    assert images.max() > 230


def test_measurements_cover_the_ranges_of_hc18(tiny_phantoms):
    pixel_sizes = np.array([p.pixel_size_mm * 80 / REFERENCE_WIDTH for p in tiny_phantoms])
    circumferences = np.array([p.head_circumference_mm for p in tiny_phantoms])
    ratios = np.array([p.ellipse.semi_minor / p.ellipse.semi_major for p in tiny_phantoms])

    for values, (low, high) in (
        (pixel_sizes, PIXEL_SIZE_RANGE_MM),
        (circumferences, HEAD_CIRCUMFERENCE_RANGE_MM),
        (ratios, CEPHALIC_INDEX_RANGE),
    ):
        assert values.min() >= low * (1 - 1e-9)
        assert values.max() <= high * (1 + 1e-9)
        # The extremes are rare, but most of the range is there.
        assert values.min() < low + 0.15 * (high - low)
        assert values.max() > high - 0.25 * (high - low)


def test_few_heads_leave_the_image(tiny_phantoms):
    share = np.mean([not fits(phantom) for phantom in tiny_phantoms])
    assert 0.0 < share < 0.08
