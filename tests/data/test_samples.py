import dataclasses

import cv2
import numpy as np
import pytest

from fetal_flax.config import AugmentationConfig
from fetal_flax.data.samples import Transform, apply_transform, draw_transform

SIZE = (96, 128)


def _head() -> tuple[np.ndarray, np.ndarray]:
    mask = np.zeros(SIZE, np.uint8)
    cv2.ellipse(mask, (70, 44), (30, 18), 25, 0, 360, 255, cv2.FILLED)
    return cv2.GaussianBlur(mask, (5, 5), 0), mask


def _moments(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Centre (x, y), area and angle in degrees of a mask."""
    m = cv2.moments(mask, binaryImage=True)
    angle = 0.5 * np.arctan2(2 * m["mu11"], m["mu20"] - m["mu02"])
    return m["m10"] / m["m00"], m["m01"] / m["m00"], m["m00"], float(np.degrees(angle))


def _draws(config: AugmentationConfig, count: int = 4000) -> list[Transform]:
    return [draw_transform(config, np.random.default_rng([1, i])) for i in range(count)]


def test_parts_are_drawn_independently():
    draws = _draws(AugmentationConfig())
    happened = np.array(
        [(t.flip, t.rotation_degrees != 0, t.scale != 1, t.shift != (0, 0)) for t in draws]
    )
    np.testing.assert_allclose(happened.mean(axis=0), 0.5, atol=0.04)
    correlation = np.corrcoef(happened.T.astype(float))
    np.testing.assert_allclose(correlation, np.eye(4), atol=0.06)


@pytest.mark.parametrize("probability", [0.0, 0.2, 1.0])
def test_probabilities(probability: float):
    draws = _draws(
        AugmentationConfig(flip_probability=1 - probability, affine_probability=probability)
    )
    assert np.mean([t.flip for t in draws]) == pytest.approx(1 - probability, abs=0.03)
    for part in ("rotation_degrees", "scale", "shift"):
        happened = [getattr(t, part) != getattr(Transform(), part) for t in draws]
        assert np.mean(happened) == pytest.approx(probability, abs=0.03)


def test_ranges_are_used_whole():
    draws = _draws(
        AugmentationConfig(rotation_degrees=30, scale=0.2, translation=0.05, affine_probability=1)
    )
    values = np.array([(t.rotation_degrees, t.scale, *t.shift) for t in draws])
    limits = np.array([(-30, 0.8, -0.05, -0.05), (30, 1.2, 0.05, 0.05)])
    np.testing.assert_allclose(values.min(axis=0), limits[0], rtol=0.01)
    np.testing.assert_allclose(values.max(axis=0), limits[1], rtol=0.01)
    assert np.all((values >= limits[0]) & (values <= limits[1]))
    assert np.abs(np.corrcoef(values.T) - np.eye(4)).max() < 0.06


def test_no_transform_changes_nothing():
    for before, after in zip(_head(), apply_transform(Transform(), *_head()), strict=True):
        np.testing.assert_array_equal(before, after)


def test_flip_is_left_to_right():
    image, mask = _head()
    flipped = apply_transform(Transform(flip=True), image, mask)
    np.testing.assert_array_equal(flipped[0], image[:, ::-1])
    np.testing.assert_array_equal(flipped[1], mask[:, ::-1])


def test_geometry():
    image, mask = _head()
    x, y, area, angle = _moments(mask)
    center_x, center_y = (SIZE[1] - 1) / 2, (SIZE[0] - 1) / 2

    moved = _moments(apply_transform(Transform(shift=(-0.125, 0.0625)), image, mask)[1])
    np.testing.assert_allclose(moved[:2], (x + 8, y - 12), atol=0.3)

    scaled = _moments(apply_transform(Transform(scale=1.1), image, mask)[1])
    assert scaled[2] == pytest.approx(1.21 * area, rel=0.02)
    np.testing.assert_allclose(
        scaled[:2], (center_x + 1.1 * (x - center_x), center_y + 1.1 * (y - center_y)), atol=0.3
    )

    turned = _moments(apply_transform(Transform(rotation_degrees=15), image, mask)[1])
    assert turned[2] == pytest.approx(area, rel=0.02)
    assert abs(abs(turned[3] - angle) - 15) < 1
    distance = np.hypot(x - center_x, y - center_y)
    assert np.hypot(turned[0] - center_x, turned[1] - center_y) == pytest.approx(distance, abs=0.3)


def test_image_and_mask_move_together():
    image, mask = _head()
    for i in range(50):
        config = AugmentationConfig(affine_probability=1)
        transform = draw_transform(config, np.random.default_rng(i))
        new_image, new_mask = apply_transform(transform, image, mask)
        assert set(np.unique(new_mask)) == {0, 255}
        disagreement = np.mean((new_image > 127) != (new_mask > 0))
        assert disagreement < 0.01
        assert len(np.unique(new_image)) > 10  # Interpolated.


def test_outside_is_filled_with_zero():
    white = np.full(SIZE, 255, np.uint8)
    for shifted in apply_transform(Transform(shift=(0.25, 0.25)), white, white):
        assert not shifted[:23].any()
        assert not shifted[:, :31].any()
        assert np.all(shifted[25:, 33:] == 255)


def test_same_generator_same_transform():
    config = AugmentationConfig()
    twice = [draw_transform(config, np.random.default_rng([0, 3, 1, 17])) for _ in range(2)]
    assert twice[0] == twice[1]
    assert twice[0] != draw_transform(config, np.random.default_rng([0, 4, 1, 17]))


def test_switching_a_part_off_leaves_the_others():
    config = AugmentationConfig()
    without_flips = dataclasses.replace(config, flip_probability=0)
    for a, b in zip(_draws(config, 50), _draws(without_flips, 50), strict=True):
        assert dataclasses.replace(a, flip=False) == b
