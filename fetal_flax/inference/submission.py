"""`fetal-flax submission`: the CSV that the HC18 challenge takes (https://hc18.grand-challenge.org).

A row is an ellipse in millimetres. Centre and axes are pixels times the pixel size, with the first
pixel's centre at 0; `a` is the major semi-axis and the angle runs from the image's x axis (right)
towards its y axis (down), between 0 and pi.
"""

import dataclasses
import math
from pathlib import Path

from fetal_flax._util.files import csv_bytes, write_atomically
from fetal_flax.config import TestTimeAugmentation
from fetal_flax.inference.predict import measured_sources
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
        output: The CSV to write. An image without a head has no row, and is reported.
        tta: As in `predict`.

    Raises:
        InputError: As `predict`.
    """
    rows: list[tuple[object, ...]] = [COLUMNS]
    failed: list[str] = []
    for image, measurement in measured_sources(
        checkpoint, source, failed, pixel_size_csv=pixel_size_csv, tta=tta
    ):
        path, pixel_size = image.path, measurement.pixel_size_mm
        if measurement.head is None:
            failed.append(f"{path} shows no head that the network could find")
        elif pixel_size is None:
            failed.append(f"{path} doesn't tell its pixel size: add it to {pixel_size_csv}")
        else:
            rows.append((path.name, *to_row(measurement.head.ellipse, pixel_size)))
    write_atomically(output, csv_bytes(rows))
    return SubmissionReport(len(rows) - 1, tuple(failed))


def to_row(ellipse: Ellipse, pixel_size_mm: float) -> tuple[float, ...]:
    """Returns an ellipse as the challenge writes it, behind the file's name."""
    lengths = (ellipse.center_x, ellipse.center_y, ellipse.semi_major, ellipse.semi_minor)
    return (*(length * pixel_size_mm for length in lengths), ellipse.angle % math.pi)
