import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

from fetal_flax import checkpoints
from fetal_flax.checkpoints import Checkpoint, Description
from fetal_flax.commands.main import main
from fetal_flax.config import ModelConfig
from fetal_flax.inference.segmenter import Segmenter
from fetal_flax.inference.submission import COLUMNS, to_row
from fetal_flax.measurement.ellipse import Ellipse
from fetal_flax.models import functional

pytestmark = pytest.mark.usefixtures("quick_compilation")

PIXEL_SIZE_MM = 0.25
# Wider than high and higher than wide, leaning either way.
ELLIPSES = [
    Ellipse(70.3, 41.8, semi_major=33.2, semi_minor=21.4, angle=angle)
    for angle in (0.0, 0.5, -0.5, 1.3, -1.3)
]


@pytest.fixture
def challenge(tmp_path, monkeypatch) -> Path:
    """A test set of white ellipses, and a network that sees what is white."""
    (tmp_path / "test_set").mkdir()
    rows = ["filename,pixel size(mm)"]
    for index, ellipse in enumerate(ELLIPSES):
        name = f"{index:03d}_HC.png"
        cv2.imwrite(str(tmp_path / "test_set" / name), ellipse.filled(96, 144))
        rows.append(f"{name},{PIXEL_SIZE_MM}")
    (tmp_path / "sizes.csv").write_text("\r\n".join(rows))
    model = ModelConfig(name="unet", base_width=4)
    # Phantoms' masks have no outline to take off.
    config = {"data": {"dataset": "fetal_phantom"}}
    metadata = Description("network", model, (64, 64), config=config)
    saved = Checkpoint(functional.init(model, 0), metadata)
    checkpoints.save_checkpoint(tmp_path / "checkpoint", saved)

    def segment(self, items, image):
        for item in items:
            yield item, np.where(image(item) > 0, 9, -9).astype(np.float32)[None]

    monkeypatch.setattr(Segmenter, "segment", segment)
    return tmp_path


def run(folder: Path) -> int:
    flags = ("checkpoint", "checkpoint"), ("input", "test_set"), ("pixel-size-csv", "sizes.csv")
    command = [part for flag, name in flags for part in (f"--{flag}", str(folder / name))]
    return main(["submission", *command, "--output", str(folder / "submission.csv")])


def drawn(row: dict[str, str]) -> np.ndarray:
    """The row's ellipse, drawn by OpenCV, which takes full axes and degrees from x towards y."""
    x, y, a, b = (float(row[name]) / PIXEL_SIZE_MM for name in COLUMNS[1:5])
    degrees = float(np.rad2deg(float(row["angle_rad"])))
    return cv2.ellipse(np.zeros((96, 144), np.uint8), ((x, y), (2 * a, 2 * b), degrees), 255, -1)


def test_an_ellipse_comes_back_from_the_csv(challenge):
    assert run(challenge) == 0
    with (challenge / "submission.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["filename"] for row in rows] == [f"{n:03d}_HC.png" for n in range(len(ELLIPSES))]
    for row, ellipse in zip(rows, ELLIPSES, strict=True):
        ours, true = drawn(row) > 0, ellipse.filled(96, 144) > 0
        dice = 2 * (ours & true).sum() / (ours.sum() + true.sum())
        # OpenCV draws half a pixel more. Exchanged axes or the other sign would be far off.
        assert dice > 0.97
        expected = to_row(ellipse, PIXEL_SIZE_MM)
        assert [float(row[name]) for name in COLUMNS[1:5]] == pytest.approx(expected[:4], abs=0.03)
        assert 0 <= float(row["angle_rad"]) < np.pi


def test_an_image_without_a_head_is_named_and_the_others_have_their_rows(challenge, capsys):
    cv2.imwrite(str(challenge / "test_set" / "001_HC.png"), np.zeros((96, 144), np.uint8))
    (challenge / "test_set" / "003_HC.png").write_bytes(b"no image")
    assert run(challenge) == 2
    error = capsys.readouterr().err
    assert "001_HC.png shows no head" in error and "003_HC.png is not an image" in error
    with (challenge / "submission.csv").open(newline="") as file:
        names = [row["filename"] for row in csv.DictReader(file)]
    assert names == ["000_HC.png", "002_HC.png", "004_HC.png"]
