import dataclasses
import math

import hypothesis
import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import skimage.measure
from hypothesis import strategies as st
from scipy import ndimage

from fetal_flax.data import hc18
from fetal_flax.data.phantoms import make_phantom
from fetal_flax.measurement.ellipse import Ellipse
from fetal_flax.measurement.head import (
    OUTLINE_PX,
    Head,
    edge_points,
    fill_holes,
    fit_ellipse,
    largest_region,
    measure_head,
)

ELLIPSE = Ellipse(center_x=203.3, center_y=121.8, semi_major=140.6, semi_minor=95.2, angle=0.4)


def _mask(ellipse: Ellipse, height: int = 260, width: int = 400) -> np.ndarray:
    return ellipse.filled(height, width) > 0


def _measured(mask: np.ndarray, outline_px: float = 0.0) -> Head:
    head = measure_head(mask, outline_px=outline_px)
    assert head is not None
    return head


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    center=st.tuples(st.floats(-30, 70), st.floats(-30, 60)),
    axes=st.tuples(st.floats(0.01, 90), st.floats(0.01, 90)),
    angle=st.floats(-math.pi / 2, math.pi / 2),
)
# Their edges run through centres of pixels.
@hypothesis.example(center=(20, 15), axes=(13, 5), angle=0.0)
@hypothesis.example(center=(20, 15), axes=(10, 10), angle=math.pi / 4)
@hypothesis.example(center=(20.5, 14.5), axes=(6.5, 12.5), angle=math.pi / 2)
def test_an_ellipse_holds_the_pixels_whose_centres_are_inside(center, axes, angle):
    ellipse = Ellipse(center[0], center[1], max(axes), min(axes), angle)
    x, y = np.arange(40)[None, :] - center[0], np.arange(30)[:, None] - center[1]
    along = (x * math.cos(angle) + y * math.sin(angle)) / max(axes)
    across = (y * math.cos(angle) - x * math.sin(angle)) / min(axes)
    expected = np.where(along**2 + across**2 <= 1, 255, 0)
    np.testing.assert_array_equal(ellipse.filled(30, 40), expected)


@pytest.mark.parametrize("angle", [-1.5, -0.7, 0.0, 0.4, 1.2, math.pi / 2 - 0.01])
def test_a_drawn_ellipse_is_found_again(angle):
    drawn = dataclasses.replace(ELLIPSE, semi_major=110.6, angle=angle)
    found = _measured(_mask(drawn)).ellipse
    for field in ("center_x", "center_y", "semi_major", "semi_minor"):
        assert getattr(found, field) == pytest.approx(getattr(drawn, field), abs=0.05)
    turned = (found.angle - angle + math.pi / 2) % math.pi - math.pi / 2
    assert turned == pytest.approx(0, abs=2e-3)
    assert -math.pi / 2 <= found.angle <= math.pi / 2


def test_another_librarys_fit_gives_the_same_axes():
    points, _ = edge_points(_mask(ELLIPSE))
    other = skimage.measure.EllipseModel.from_estimate(points)
    ours = fit_ellipse(points)
    assert ours is not None
    assert sorted(other.axis_lengths) == pytest.approx([ours.semi_minor, ours.semi_major], abs=0.02)
    assert other.center == pytest.approx([ours.center_x, ours.center_y], abs=0.02)


def test_millimetres_are_pixels_times_their_size():
    size = _measured(_mask(ELLIPSE)).in_mm(0.2)
    assert size.circumference == pytest.approx(0.2 * ELLIPSE.circumference, rel=5e-4)
    assert size.biparietal_diameter == pytest.approx(0.4 * ELLIPSE.semi_minor, rel=1e-3)
    assert size.occipitofrontal_diameter == pytest.approx(0.4 * ELLIPSE.semi_major, rel=1e-3)


def test_the_outline_is_taken_off_both_axes():
    without, taken_off = (_measured(_mask(ELLIPSE), px).ellipse for px in (0.0, 1.4))
    assert taken_off.semi_major == pytest.approx(without.semi_major - 1.4)
    assert taken_off.semi_minor == pytest.approx(without.semi_minor - 1.4)
    assert (taken_off.center_x, taken_off.angle) == (without.center_x, without.angle)


@pytest.mark.parametrize("outline_px", [0.0, 1.4])
def test_the_edges_ellipse_keeps_the_outline(outline_px):
    head = _measured(_mask(ELLIPSE), outline_px)
    assert head.edge_ellipse == fit_ellipse(edge_points(_mask(ELLIPSE))[0])
    assert head.edge_ellipse.semi_major == head.ellipse.semi_major + outline_px


@pytest.mark.parametrize("side", ["top", "left", "bottom", "right"])
def test_a_head_cut_off_by_the_border_is_measured_as_if_it_went_on(side):
    y = {"top": 70.0, "bottom": 190.0}.get(side, 130.0)
    x = {"left": 110.0, "right": 290.0}.get(side, 200.0)
    cut = dataclasses.replace(ELLIPSE, center_x=x, center_y=y)
    head = _measured(_mask(cut))
    assert head.touches_border
    assert head.ellipse.circumference == pytest.approx(cut.circumference, rel=1e-3)
    assert not _measured(_mask(ELLIPSE)).touches_border


def test_only_the_largest_region_counts_and_its_holes_are_filled():
    mask = _mask(ELLIPSE)
    spoilt = mask.copy()
    spoilt[100:140, 180:220] = False
    spoilt[2:9, 2:9] = True
    region, components = largest_region(spoilt)
    np.testing.assert_array_equal(region, mask)
    assert components == 2
    assert _measured(spoilt).components == 2
    assert _measured(spoilt).ellipse == _measured(mask).ellipse


MASKS = arrays.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(MASKS)
def test_holes_are_those_that_scipy_fills(mask):
    filled = fill_holes(mask)
    assert filled.dtype == np.bool_
    np.testing.assert_array_equal(filled, ndimage.binary_fill_holes(mask))


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(MASKS)
def test_regions_are_those_that_scipy_labels_in_the_whole_image(mask):
    labels, count = ndimage.label(mask)
    sizes = [(labels == label).sum() for label in range(1, count + 1)]
    expected = labels == int(np.argmax(sizes)) + 1 if sizes else mask
    region, components = largest_region(mask)
    assert components == count
    np.testing.assert_array_equal(region, ndimage.binary_fill_holes(expected))


def test_regions_that_touch_at_corners_are_two():
    mask = np.zeros((8, 8), bool)
    mask[1:3, 1:3] = mask[3:6, 3:6] = True
    region, components = largest_region(mask)
    assert components == 2
    assert region.sum() == 9


def test_edges_enclose_the_pixels():
    mask = np.zeros((5, 6), bool)
    mask[2, 3] = True
    points, touches_border = edge_points(mask)
    assert {tuple(point) for point in points} == {(3, 1.5), (3, 2.5), (2.5, 2), (3.5, 2)}
    assert not touches_border


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros((40, 60), bool),
        np.ones((40, 60), bool),
        np.eye(40, dtype=bool),
        np.pad(np.ones((1, 30), bool), 8),
        np.pad(np.ones((1, 1), bool), 8),
    ],
    ids=["empty", "full", "diagonal", "line", "pixel"],
)
def test_no_head_is_none(mask):
    assert measure_head(mask, outline_px=1.4) is None


@pytest.mark.parametrize("count", range(6))
def test_too_few_points_give_no_ellipse(count):
    assert fit_ellipse(np.arange(2.0 * count).reshape(-1, 2)) is None


def test_phantoms_are_measured_to_their_circumference():
    errors = []
    for index in range(25):
        phantom = make_phantom(0, index)
        head = measure_head(phantom.mask > 0, outline_px=0.0)
        assert head is not None
        size = head.in_mm(phantom.pixel_size_mm)
        errors.append(size.circumference - phantom.head_circumference_mm)
    assert abs(np.mean(errors)) < 0.01
    assert np.max(np.abs(errors)) < 0.05


def test_hc18s_masks_are_measured_to_the_csv(hc18_sample):
    errors = []
    for record in hc18_sample:
        _, mask = hc18.load(record)
        head = measure_head(mask > 0, outline_px=OUTLINE_PX["hc18"])
        assert head is not None
        size = head.in_mm(record.pixel_size_mm)
        errors.append(size.circumference - record.head_circumference_mm)
    assert abs(np.mean(errors)) < 0.1
    assert np.mean(np.abs(errors)) < 0.06
    assert np.max(np.abs(errors)) < 0.5


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("mask", [np.eye(5, dtype=np.int64), np.ones((2, 5, 5), bool)])
def test_what_is_no_mask_is_refused(mask):
    with pytest.raises(ValueError, match="a mask must be 2-D and boolean, not "):
        measure_head(mask, outline_px=0.0)
