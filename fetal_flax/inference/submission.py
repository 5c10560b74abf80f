"""`fetal-flax submission`: the CSV that the HC18 challenge takes (https://hc18.grand-challenge.org).

A row is an ellipse in millimetres. Centre and axes are pixels times the pixel size, with the first
pixel's centre at 0; `a` is the major semi-axis and the angle runs from the image's x axis (right)
towards its y axis (down), between 0 and pi.
"""

import dataclasses
import math
from pathlib import Path

from fetal_flax._util.files import csv_bytes, growing_csv
from fetal_flax.checkpoints import load_checkpoint
from fetal_flax.config import TestTimeAugmentation
from fetal_flax.errors import file_name
from fetal_flax.inference.predict import measured_sources
from fetal_flax.inference.sources import Outcome
from fetal_flax.measurement.ellipse import Ellipse

COLUMNS = (
    "filename",
    "center_x_mm",
    "center_y_mm",
    "semi_axes_a_mm",
    "semi_axes_b_mm",
    "angle_rad",
)


@dataclasses.dataclass(frozen=True)
class SubmissionReport:
    """What became of the images."""

    measured: int
    problems: tuple[str, ...]
    """A sentence for each image that has no row: unreadable, or without a head."""


def submission(
    checkpoint: Path,
    source: Path,
    pixel_size_csv: Path,
    output: Path,
    *,
    tta: TestTimeAugmentation = "none",
) -> SubmissionReport:
    """Measures the images of a folder and writes the challenge's CSV.

    Args:
        checkpoint: Training workdir, converted directory, or a shipped network's name.
        source: The challenge's `test_set`.
        pixel_size_csv: Its `test_set_pixel_size.csv`.
        output: The CSV to write, row by row. An image without a head has no row, and is reported;
            without any head there is no file.
        tta: As in `predict`.

    Raises:
        InputError: As `predict`.
    """
    outcome, count = Outcome(), 0
    failed = outcome.failed
    network = load_checkpoint(checkpoint)
    measured = measured_sources(network, source, outcome, pixel_size_csv=pixel_size_csv, tta=tta)
    with growing_csv(output, COLUMNS) as table:
        for image, measurement in measured:
            path, pixel_size = image.path, measurement.pixel_size_mm
            if measurement.head is None:
                whole = "covers_image" in measurement.flags
                what = "is head all over, to the network" if whole else "shows no head"
                failed.append(f"{path} {what}: there is nothing to measure")
            elif pixel_size is None:
                failed.append(f"{path} doesn't tell its pixel size: add it to {pixel_size_csv}")
            else:
                row = (file_name(path.name), *to_row(measurement.head.ellipse, pixel_size))
                table.add(csv_bytes([row]))
                count += 1
    return SubmissionReport(count, tuple(failed))


def to_row(ellipse: Ellipse, pixel_size_mm: float) -> tuple[float, ...]:
    """Returns an ellipse as the challenge writes it, behind the file's name."""
    lengths = (ellipse.center_x, ellipse.center_y, ellipse.semi_major, ellipse.semi_minor)
    return (*(length * pixel_size_mm for length in lengths), ellipse.angle % math.pi)
