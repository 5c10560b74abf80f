import math

import cv2
import numpy as np
import pytest

from fetal_flax.reporting.pictures import (
    PREDICTION_COLOUR,
    THICK_OUTLINE_FROM,
    TRUTH_COLOUR,
    overlay,
    overlay_sheet,
    training_curves,
    write_png,
)


def grey_image(height=80, width=120):
    return np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)


def disc(height=80, width=120, *, centre=(60, 40), radius=25):
    y, x = np.mgrid[:height, :width]
    return (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2


def has_colour(rgb, colour):
    """Where the colour is; thin anti-aliased lines have it mixed with some grey."""
    return (np.abs(rgb.astype(int) - colour) <= 60).all(-1)


def distance_to_edge(mask):
    """Pixels to the nearest border pixel of the mask's inside."""
    inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8))
    edge = mask & (inner == 0)
    return cv2.distanceTransform((~edge).astype(np.uint8), cv2.DIST_L2, 5)


@pytest.mark.parametrize("scale", [1, 6])
def test_outlines_follow_the_edges_and_leave_the_rest_alone(scale):
    height, width = 80 * scale, 120 * scale
    assert (width >= THICK_OUTLINE_FROM) == (scale == 6)
    image = grey_image(height, width)
    truth = disc(height, width, centre=(70 * scale, 40 * scale), radius=25 * scale)
    prediction = disc(height, width, centre=(40 * scale, 40 * scale), radius=20 * scale)
    rgb = overlay(image, prediction=prediction, truth=truth)

    assert rgb.shape == (height, width, 3) and rgb.dtype == np.uint8
    for mask, colour in ((truth, TRUTH_COLOUR), (prediction, PREDICTION_COLOUR)):
        drawn = has_colour(rgb, colour)
        assert drawn.sum() > 40 * scale
        assert distance_to_edge(mask)[drawn].max() <= 2
    far = (distance_to_edge(truth) > 4) & (distance_to_edge(prediction) > 4)
    np.testing.assert_array_equal(rgb[far], np.stack([image[far]] * 3, -1))


def test_the_prediction_is_drawn_last():
    rgb = overlay(grey_image(), prediction=disc(), truth=disc())
    assert has_colour(rgb, PREDICTION_COLOUR).any()
    assert not has_colour(rgb, TRUTH_COLOUR).any()


def test_without_masks_or_with_empty_ones_the_image_stays():
    image = grey_image()
    empty = np.zeros(image.shape, bool)
    for rgb in (overlay(image), overlay(image, prediction=empty, truth=empty)):
        np.testing.assert_array_equal(rgb, np.stack([image] * 3, -1))


def test_overlay_does_not_change_its_arguments():
    image, mask = grey_image(), disc()
    overlay(image, prediction=mask)
    np.testing.assert_array_equal(image, grey_image())
    np.testing.assert_array_equal(mask, disc())


def test_holes_are_outlined_too():
    image = np.zeros((80, 120), np.uint8)
    hole = disc(radius=10)
    rgb = overlay(image, truth=disc() & ~hole)
    assert rgb[distance_to_edge(hole) <= 1].any()


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(120, 80\)"):
        overlay(grey_image(), truth=disc().T)


def test_write_png_keeps_red_green_and_blue_apart(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    write_png(tmp_path / "overlays" / "a.png", rgb)
    read = cv2.imread(str(tmp_path / "overlays" / "a.png"), cv2.IMREAD_COLOR)
    assert read is not None
    np.testing.assert_array_equal(read[..., ::-1], rgb)


def read_rgb(path):
    read = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert read is not None
    return read[..., ::-1]


@pytest.mark.parametrize("count", [1, 5, 12])
def test_sheet_is_one_reasonable_png(tmp_path, count):
    path = tmp_path / "new" / "sheet.png"
    overlay_sheet(
        path,
        [grey_image(540, 800)] * count,
        [disc(540, 800, centre=(380, 270), radius=180)] * count,
        [disc(540, 800, centre=(400, 270), radius=180)] * count,
        [f"{index:03d}_HC" for index in range(count)],
        [0.95] * count,
    )
    rgb = read_rgb(path)
    assert has_colour(rgb, TRUTH_COLOUR).any()
    assert has_colour(rgb, PREDICTION_COLOUR).any()
    # Noise, the worst case for PNG; ultrasound takes half of it.
    assert path.stat().st_size < 2.5e6
    assert not list(path.parent.glob("*.tmp"))


def test_sheet_takes_images_of_different_sizes(tmp_path):
    images = [grey_image(64, 64), grey_image(540, 800), grey_image(300, 200)]
    masks = [disc(*image.shape) for image in images]
    overlay_sheet(tmp_path / "sheet.png", images, masks, masks, ["a", "b", "c"], [1.0] * 3)
    assert read_rgb(tmp_path / "sheet.png").size


def test_sheet_refuses_nothing_and_unequal_lengths(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        overlay_sheet(tmp_path / "sheet.png", [], [], [], [], [])
    with pytest.raises(ValueError):
        overlay_sheet(tmp_path / "sheet.png", [grey_image()], [disc()], [disc()], ["a", "b"], [1.0])
    assert not list(tmp_path.iterdir())


def history(epochs):
    return [
        {
            "epoch": epoch,
            "train_loss": math.exp(-epoch / 5),
            "validation_loss": math.exp(-epoch / 6),
            "train_dice": 1 - math.exp(-epoch / 5),
            "validation_dice": 1 - math.exp(-epoch / 6),
            "learning_rate": 3e-4 * 0.5 ** (epoch // 10),
            "images_per_second": 100.0,
            "seconds": 8.0,
        }
        for epoch in range(1, epochs + 1)
    ]


@pytest.mark.parametrize("epochs", [1, 30])
def test_curves_are_drawn(tmp_path, epochs):
    path = tmp_path / "curves.png"
    training_curves(path, history(epochs))
    rgb = read_rgb(path)
    height, width, _ = rgb.shape
    assert width > 2 * height
    # The validation curve's colour, in the first two of the three panels.
    columns = np.flatnonzero(has_colour(rgb, (0xD5, 0x5E, 0x00)).any(axis=0))
    assert columns.min() < width / 3 < columns.max() < 2 * width / 3
    assert path.stat().st_size < 3e5


def test_curves_of_a_diverged_run_are_drawn(tmp_path):
    diverged = history(3)
    diverged[-1] |= {"train_loss": math.nan, "validation_loss": math.inf, "validation_dice": 0.0}
    training_curves(tmp_path / "curves.png", diverged)
    assert (tmp_path / "curves.png").exists()


def test_curves_of_no_epoch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one epoch"):
        training_curves(tmp_path / "curves.png", [])
