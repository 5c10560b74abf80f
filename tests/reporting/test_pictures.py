import math

import cv2
import numpy as np
import pytest
from matplotlib.axes import Axes

from fetal_flax.measurement.ellipse import Ellipse
from fetal_flax.reporting.pictures import (
    ELLIPSE_COLOUR,
    PREDICTION_COLOUR,
    THICK_OUTLINE_FROM,
    TRUTH_COLOUR,
    SheetImage,
    draw_ellipse,
    overlay,
    overlay_sheet,
    training_curves,
    write_png,
)

ELLIPSE = Ellipse(center_x=380.0, center_y=270.0, semi_major=190.0, semi_minor=160.0, angle=0.3)


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


@pytest.mark.usefixtures("shapes_unchecked")
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


def test_an_ellipse_is_drawn_where_a_picture_of_another_size_has_it():
    ellipse = Ellipse(30.0, 20.0, 15.0, 9.0, 0.4)
    blank = np.zeros((240, 480, 3), np.uint8)
    drawn = draw_ellipse(blank, ellipse, scale=(8.0, 6.0)).any(-1)
    enlarged = np.kron(ellipse.filled(40, 60), np.ones((6, 8), np.uint8))
    for axis, pixel in ((0, 6), (1, 8)):
        ours, expected = (np.nonzero(mask)[axis] for mask in (drawn, enlarged))
        ours, expected = (np.array([where.min(), where.max()]) for where in (ours, expected))
        assert abs(ours - expected).max() <= pixel
        assert ours.mean() == pytest.approx(expected.mean(), abs=1)
    assert not blank.any()


def sheet_image(height=540, width=800, *, ellipse: Ellipse | None = ELLIPSE, name="000_HC"):
    truth = disc(height, width, centre=(width // 2, height // 2), radius=height // 3)
    prediction = np.roll(truth, -width // 40, axis=1)
    return SheetImage(name, grey_image(height, width), prediction, truth, ellipse, 0.97, 0.95)


@pytest.mark.parametrize("count", [1, 5, 12])
def test_sheet_is_one_reasonable_png(tmp_path, count):
    path = tmp_path / "new" / "sheet.png"
    overlay_sheet(path, [sheet_image(name=f"{index:03d}_HC") for index in range(count)])
    rgb = read_rgb(path)
    assert has_colour(rgb, TRUTH_COLOUR).any()
    assert has_colour(rgb, PREDICTION_COLOUR).any()
    # Noise, the worst case for PNG; ultrasound takes half of it.
    assert path.stat().st_size < 2.5e6
    assert not list(path.parent.glob("*.tmp"))


def test_sheet_shows_the_ellipse_where_there_is_one(tmp_path):
    shown = []
    for ellipse in (ELLIPSE, None):
        overlay_sheet(tmp_path / "sheet.png", [sheet_image(ellipse=ellipse)])
        shown.append(has_colour(read_rgb(tmp_path / "sheet.png"), ELLIPSE_COLOUR).sum())
    # The legend names the colour in any case.
    assert shown[0] > shown[1] + 500 and shown[1] > 0


def test_sheet_says_both_dice(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(Axes, "set_title", lambda panel, text, **_: said.append(text))
    overlay_sheet(tmp_path / "sheet.png", [sheet_image(name="a"), sheet_image(name="b")])
    assert said == [f"{name}\nDice: ellipse 0.970, raw mask 0.950" for name in ("a", "b")]


def test_sheet_takes_images_of_different_sizes(tmp_path):
    sizes = [(64, 64), (540, 800), (300, 200)]
    overlay_sheet(tmp_path / "sheet.png", [sheet_image(*size) for size in sizes])
    assert read_rgb(tmp_path / "sheet.png").size


def test_sheet_refuses_nothing(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        overlay_sheet(tmp_path / "sheet.png", [])
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
