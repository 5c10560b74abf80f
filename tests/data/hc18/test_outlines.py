import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

from fetal_flax.data.hc18 import fill_outline
from fetal_flax.data.images import read_gray
from fetal_flax.errors import InputError

SIZE = (108, 160)


def _ellipse(center=(80, 54), axes=(50, 38), angle=20, *, filled: bool = False) -> np.ndarray:
    drawn = np.zeros(SIZE, np.uint8)
    cv2.ellipse(drawn, center, axes, angle, 0, 360, 255, cv2.FILLED if filled else 1)
    return drawn


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.mark.parametrize(
    "center",
    [(80, 54), (80, 36), (80, 72), (40, 54), (120, 54), (45, 34), (115, 75), (46, 76)],
    ids=["closed", "top", "bottom", "left", "right", "corner", "corner", "corner"],
)
def test_fills_closed_and_open_outlines(center):
    outline = _ellipse(center)
    mask = fill_outline(outline)
    assert set(np.unique(mask)) == {0, 255}
    assert mask.dtype == np.uint8
    assert np.all(mask[outline > 0] == 255)
    assert _dice(mask, _ellipse(center, filled=True)) > 0.995


def test_a_closed_outline_is_filled_exactly():
    outline = _ellipse()
    contours, _ = cv2.findContours(outline, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    expected = cv2.drawContours(np.zeros(SIZE, np.uint8), contours, 0, 255, cv2.FILLED)
    np.testing.assert_array_equal(fill_outline(outline), expected)


def test_head_across_the_whole_width():
    outline = _ellipse((80, 54), (100, 35), 0)
    assert _dice(fill_outline(outline), _ellipse((80, 54), (100, 35), 0, filled=True)) > 0.98


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("center", [(80, 54), (80, 36)])
def test_closes_small_gaps(center, width: int):
    outline = _ellipse(center)
    column = np.flatnonzero(outline[center[1]])[0]
    outline[center[1] : center[1] + width, column - 1 : column + 2] = 0
    assert _dice(fill_outline(outline), _ellipse(center, filled=True)) > 0.99


def _gap() -> np.ndarray:
    outline = _ellipse()
    outline[40:60, :80] = 0
    return outline


def _line() -> np.ndarray:
    line = np.zeros(SIZE, np.uint8)
    line[50, 20:140] = 255
    return line


def _rectangle() -> np.ndarray:
    return cv2.rectangle(np.zeros(SIZE, np.uint8), (20, 20), (140, 90), 255)


def _two() -> np.ndarray:
    return _ellipse((40, 54), (20, 15)) | _ellipse((120, 54), (20, 15))


@pytest.mark.parametrize(
    "outline",
    [
        np.zeros(SIZE, np.uint8),
        np.full(SIZE, 255, np.uint8),
        _line(),
        _line().T.copy(),
        _ellipse(axes=(4, 3)),
        _gap(),
        _rectangle(),
        _two(),
        np.eye(*SIZE, dtype=np.uint8) * 255,
        np.pad(np.zeros((106, 158), np.uint8), 1, constant_values=255),
    ],
    ids=[
        "empty",
        "white",
        "line",
        "vertical",
        "speck",
        "gap",
        "rectangle",
        "two",
        "diagonal",
        "frame",
    ],
)
def test_refuses_what_is_no_ellipse(outline: np.ndarray):
    with pytest.raises(InputError, match="ellipse"):
        fill_outline(outline)


OPEN = ("186_HC", "346_HC", "352_2HC", "628_2HC", "787_HC")


def _check_real(folder: Path, names: list[str]) -> None:
    """Compares filled masks with the ellipse through the outline, and with the CSV."""
    with (folder / "training_set_pixel_size_and_HC.csv").open(newline="") as file:
        rows = {row["filename"].removesuffix(".png"): row for row in csv.DictReader(file)}
    for name in names:
        outline = read_gray(folder / "training_set" / f"{name}_Annotation.png")
        mask = fill_outline(outline)
        points = np.argwhere(outline)[:, ::-1].astype(np.float32)
        center, axes, angle = cv2.fitEllipse(points)
        ellipse = np.zeros_like(outline)
        cv2.ellipse(ellipse, (center, axes, angle), 255, cv2.FILLED)
        assert _dice(mask, ellipse) > 0.998, name

        a, b = axes[0] / 2, axes[1] / 2
        circumference = np.pi * (3 * (a + b) - np.sqrt((3 * a + b) * (a + 3 * b)))
        pixel_size = float(rows[name]["pixel size(mm)"])
        truth = float(rows[name]["head circumference (mm)"])
        # HC18's outlines run 0.9 pixels outside of the ellipse that its CSV measures.
        radius_error = (circumference - truth / pixel_size) / (2 * np.pi)
        assert 0.7 < radius_error < 1.4, name


def test_real_open_outlines(shared_dir: Path):
    for name in OPEN:
        outline = read_gray(shared_dir / "hc18" / "training_set" / f"{name}_Annotation.png")
        ends = np.concatenate([outline[0], outline[-1], outline[:, 0], outline[:, -1]])
        assert ends.any(), name
    _check_real(shared_dir / "hc18", list(OPEN))


@pytest.mark.slow
def test_all_real_outlines(shared_dir: Path):
    annotations = sorted((shared_dir / "hc18" / "training_set").glob("*_Annotation.png"))
    assert len(annotations) == 805
    _check_real(shared_dir / "hc18", [p.name.removesuffix("_Annotation.png") for p in annotations])
