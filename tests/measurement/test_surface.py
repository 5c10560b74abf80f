import math

import hypothesis
import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy.spatial.distance import directed_hausdorff

from fetal_flax.measurement.surface import surface_distances

NAMES = ["hausdorff_mm", "hausdorff95_mm", "assd_mm"]
EMPTY = np.zeros((4, 6), bool)
FULL = np.ones((4, 6), bool)


def boundary(mask):
    height, width = mask.shape
    points = []
    for y in range(height):
        for x in range(width):
            neighbours = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            if mask[y, x] and not all(
                0 <= v < height and 0 <= u < width and mask[v, u] for v, u in neighbours
            ):
                points.append((y, x))
    return np.array(points, float).reshape(-1, 2)


def by_brute_force(prediction, truth, pixel_size):
    a, b = boundary(prediction), boundary(truth)
    pairs = pixel_size * np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    there, back = pairs.min(1), pairs.min(0)
    return {
        "hausdorff_mm": max(there.max(), back.max()),
        "hausdorff95_mm": max(np.percentile(there, 95), np.percentile(back, 95)),
        "assd_mm": (there.sum() + back.sum()) / (len(a) + len(b)),
    }


def rectangle(shape, top, left, height, width):
    mask = np.zeros(shape, bool)
    mask[top : top + height, left : left + width] = True
    return mask


@st.composite
def masks(draw, shape):
    """Draws a mask with at least one pixel, by one of several recipes."""
    y, x = draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))
    one = rectangle(shape, y, x, 1, 1)
    kind = draw(st.sampled_from(["pixel", "full", "rectangle", "sparse", "dense", "any"]))
    if kind == "pixel":
        return one
    if kind == "full":
        return np.ones(shape, bool)
    if kind == "rectangle":
        height, width = draw(st.integers(1, shape[0])), draw(st.integers(1, shape[1]))
        return rectangle(shape, y, x, height, width)
    if kind == "any":
        return draw(arrays.arrays(bool, shape)) | one
    share = 0.05 if kind == "sparse" else 0.9
    return (np.random.default_rng(draw(st.integers(0, 2**32))).random(shape) < share) | one


@st.composite
def mask_pairs(draw):
    shape = (draw(st.integers(1, 16)), draw(st.integers(1, 16)))
    return draw(masks(shape)), draw(masks(shape))


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(mask_pairs(), st.floats(0.05, 2))
def test_distances_equal_those_of_all_pairs(pair, pixel_size):
    prediction, truth = pair
    distances = surface_distances(prediction, truth, pixel_size)
    assert list(distances) == NAMES
    assert all(type(value) is float for value in distances.values())
    assert distances == pytest.approx(by_brute_force(prediction, truth, pixel_size), rel=1e-12)
    assert distances == pytest.approx(surface_distances(truth, prediction, pixel_size), rel=1e-12)
    a, b = boundary(prediction), boundary(truth)
    hausdorff = max(directed_hausdorff(a, b)[0], directed_hausdorff(b, a)[0])
    assert distances["hausdorff_mm"] == pytest.approx(pixel_size * hausdorff, rel=1e-12)


@hypothesis.settings(deadline=None)
@hypothesis.given(mask_pairs())
def test_distances_grow_with_the_pixel_size(pair):
    prediction, truth = pair
    pixels = surface_distances(prediction, truth, 1)
    expected = {name: value / 4 for name, value in pixels.items()}
    assert surface_distances(prediction, truth, 0.25) == expected


@hypothesis.settings(deadline=None)
@hypothesis.given(mask_pairs())
def test_a_mask_has_no_distance_to_itself(pair):
    mask, _ = pair
    assert surface_distances(mask, mask.copy(), 0.1) == dict.fromkeys(NAMES, 0)


def test_rectangles_three_pixels_apart():
    a, b = rectangle((20, 30), 4, 5, 5, 7), rectangle((20, 30), 4, 8, 5, 7)
    # Of 20 boundary pixels, the five on the left are 3 pixels from the other rectangle's left
    # side; next to them, above and below, are one 2 and one 1; the three within the other's
    # inside are 1, 2 and 1 from its top or bottom; the others are on its boundary.
    assert surface_distances(a, b, 0.5) == pytest.approx(
        {"hausdorff_mm": 1.5, "hausdorff95_mm": 1.5, "assd_mm": 0.5 * (15 + 6 + 4) / 20}
    )


def test_lines_of_unlike_length():
    long, short = rectangle((3, 30), 1, 2, 1, 21), rectangle((3, 30), 1, 2, 1, 17)
    # 21 distances, 0 but for 1, 2, 3, 4: the 95th percentile is the second largest.
    assert surface_distances(short, long, 2) == pytest.approx(
        {"hausdorff_mm": 8, "hausdorff95_mm": 6, "assd_mm": 2 * (1 + 2 + 3 + 4) / (21 + 17)}
    )


def test_the_images_edge_bounds_a_full_mask():
    distances = surface_distances(np.ones((5, 5), bool), rectangle((5, 5), 2, 2, 1, 1), 1)
    rim = 4 * math.sqrt(8) + 8 * math.sqrt(5) + 4 * 2
    assert distances["hausdorff_mm"] == pytest.approx(math.sqrt(8))
    assert distances["assd_mm"] == pytest.approx((rim + 2) / (16 + 1))


def test_a_holes_rim_is_boundary_too():
    ring = rectangle((9, 9), 1, 1, 7, 7) & ~rectangle((9, 9), 3, 3, 3, 3)
    distances = surface_distances(ring, rectangle((9, 9), 1, 1, 7, 7), 1)
    # The hole's rim is 12 pixels without its corners, all 1 pixel from the outer boundary.
    assert distances == pytest.approx(
        {"hausdorff_mm": 1, "hausdorff95_mm": 1, "assd_mm": 12 / (24 + 12 + 24)}
    )


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        (EMPTY, EMPTY, 0),
        (FULL, FULL, 0),
        (EMPTY, FULL, 0.1 * math.sqrt(3**2 + 5**2)),
        (rectangle((4, 6), 1, 1, 1, 1), EMPTY, 0.1 * math.sqrt(3**2 + 5**2)),
        (rectangle((4, 6), 0, 0, 1, 1), rectangle((4, 6), 3, 5, 1, 1), 0.1 * math.sqrt(34)),
    ],
)
def test_empty_masks_and_the_farthest_apart(prediction, truth, expected):
    distances = surface_distances(prediction, truth, 0.1)
    assert distances == pytest.approx(dict.fromkeys(NAMES, expected))
    assert all(type(value) is float for value in distances.values())


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        (EMPTY, EMPTY.T, r"prediction \(4, 6\), truth \(6, 4\)"),
        (EMPTY[None], EMPTY[None], "height, width"),
        (EMPTY[:0], EMPTY[:0], "height, width"),
        (EMPTY, EMPTY.astype(np.uint8), "must be boolean, not bool and uint8"),
    ],
)
@pytest.mark.usefixtures("shapes_unchecked")
def test_masks_that_do_not_fit_are_refused(prediction, truth, message):
    with pytest.raises(ValueError, match=message):
        surface_distances(prediction, truth, 0.1)


@pytest.mark.parametrize("pixel_size", [0, -0.1, math.inf, math.nan])
@pytest.mark.parametrize("mask", [EMPTY, FULL])
def test_a_pixel_size_that_is_none_is_refused(mask, pixel_size):
    with pytest.raises(ValueError, match="pixel size"):
        surface_distances(mask, mask, pixel_size)
