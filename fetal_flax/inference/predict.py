"""`fetal-flax predict`: masks, overlays and measurements of an image or of a folder of images."""

import dataclasses
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fetal_flax import checkpoints
from fetal_flax._util.files import csv_bytes, write_atomically
from fetal_flax.config import TestTimeAugmentation
from fetal_flax.inference.assessment import Assessment, assess
from fetal_flax.inference.segmenter import (
    NetworkLogits,
    Predictor,
    Views,
    mean_logits,
)
from fetal_flax.inference.sources import Source, find_files, pixel_sizes, read_sources
from fetal_flax.measurement.gestational_age import gestational_age
from fetal_flax.measurement.head import OUTLINE_PX, largest_region
from fetal_flax.measurement.overlap import segmentation_metrics
from fetal_flax.reporting import pictures
from fetal_flax.reporting.tables import write_mask

MEASUREMENTS = (
    "name",
    "hc_mm",
    "bpd_mm",
    "ofd_mm",
    "ga_weeks",
    "ga_low_weeks",
    "ga_high_weeks",
    "pixel_size_mm",
    "center_x_px",
    "center_y_px",
    "semi_major_px",
    "semi_minor_px",
    "angle_rad",
    "touches_border",
    "components",
    "ellipse_agreement",
    "confidence",
    "flags",
    "tta_dice",
    "tta_hc_spread_mm",
)
"""Columns of `measurements.csv`; docs/measurement.md says what each holds."""


@dataclasses.dataclass(frozen=True)
class PredictReport:
    """What became of the files that were asked for."""

    predicted: tuple[str, ...]
    """The NAME of each image whose results were written."""
    flagged: tuple[str, ...]
    """Those of them that a person should look at."""
    failed: tuple[str, ...]
    """A sentence for each file that couldn't be read, which names it."""


class MeasuredImage(NamedTuple):
    """An image and what the network sees in it."""

    source: Source
    logits: NetworkLogits
    assessment: Assessment
    views: tuple[Assessment, ...]
    """Of the image and of its mirror image, each by itself; empty without `flip`."""


def predict(
    checkpoint: Path,
    source: Path,
    output: Path,
    *,
    pixel_size_csv: Path | None = None,
    pixel_size_mm: float | None = None,
    save_logits: bool = False,
    tta: TestTimeAugmentation = "none",
) -> PredictReport:
    """Segments an image, or every image of a folder, and writes the results.

    `masks/NAME.png` is the mask at the image's own size, 0 or 255; `overlays/NAME.png` the image
    with the mask's outline and the ellipse that was measured. NAME is the file's name without its
    ending; frames of a DICOM file are numbered. `measurements.csv` has a row for each image: head
    circumference (HC), biparietal and occipitofrontal diameter (BPD, OFD; outer to outer) in
    millimetres and the gestational age where the pixel size is known, the ellipse in pixels, and
    signs of a bad measurement; empty where no head was found. Files of these names that are
    already there are overwritten, others are left alone. A file that can't be read, or has the
    NAME of one before it, is left out and reported; the others are still processed.

    Args:
        checkpoint: Training workdir, converted directory, or a shipped network's name.
        source: An image, or a folder; of a folder the images directly in it, in the order of
            their names, but not HC18's outlines (`*_Annotation.png`).
        output: Folder for the results; created if needed.
        pixel_size_csv: CSV with the columns `filename` and `pixel size(mm)`, as HC18 has it. It
            goes before what a DICOM file says of itself.
        pixel_size_mm: One size for all images instead, also before what DICOM files say.
        save_logits: Also write `logits/NAME.npy`: (height, width) float32 at the network's size,
            before the sigmoid.
        tta: `flip` averages the probabilities with those of the mirror image.

    Raises:
        InputError: `source` is or holds no image, the CSV can't be used or lacks one of them, the
            pixel size is no positive number or given beside a CSV, `checkpoint` holds no network,
            or a result can't be written.
    """
    rows: list[dict[str, object]] = []
    flagged: list[str] = []
    failed: list[str] = []
    for image in measured_images(
        checkpoint,
        source,
        failed,
        pixel_size_csv=pixel_size_csv,
        pixel_size_mm=pixel_size_mm,
        tta=tta,
    ):
        _write(output, image, save_logits=save_logits)
        rows.append(_measurements(image))
        if image.assessment.quality.flags:
            flagged.append(image.source.name)
    if rows:
        table = [MEASUREMENTS, *([row.get(name, "") for name in MEASUREMENTS] for row in rows)]
        write_atomically(output / "measurements.csv", csv_bytes(table))
    return PredictReport(tuple(str(row["name"]) for row in rows), tuple(flagged), tuple(failed))


def measured_images(
    checkpoint: Path,
    source: Path,
    failed: list[str],
    *,
    pixel_size_csv: Path | None = None,
    pixel_size_mm: float | None = None,
    tta: TestTimeAugmentation = "none",
) -> Iterator[MeasuredImage]:
    """Yields each image with what the network sees in it.

    Args:
        checkpoint: Training workdir, converted directory, or a shipped network's name.
        source: As in `predict`.
        failed: Takes a sentence for each file that can't be read.
        pixel_size_csv: As in `predict`.
        pixel_size_mm: As in `predict`.
        tta: As in `predict`.

    Raises:
        InputError: As `predict`, before the first image.
    """
    paths = find_files(source)
    sizes = pixel_sizes(paths, pixel_size_csv, pixel_size_mm)
    variables, description = checkpoints.load(checkpoint)
    predictor = Predictor(description.model, variables, description.image_size, tta=tta)
    outline_px = OUTLINE_PX[description.dataset]
    readable = read_sources(paths, sizes, failed)
    for image, views in predictor.segment(readable, lambda source: source.image):
        yield _measure(image, views, outline_px)


def _measure(source: Source, views: Views, outline_px: float) -> MeasuredImage:
    assess_view = functools.partial(assess, shape=source.image.shape, outline_px=outline_px)
    logits = mean_logits(views)
    each = tuple(map(assess_view, views)) if len(views) > 1 else ()
    return MeasuredImage(source, logits, assess_view(logits), each)


def _measurements(image: MeasuredImage) -> dict[str, object]:
    """Returns a row of `MEASUREMENTS`; what isn't known is absent."""
    pixel_size, (mask, head, quality) = image.source.pixel_size_mm, image.assessment
    row: dict[str, object] = {
        "name": image.source.name,
        "confidence": quality.confidence,
        "flags": " ".join(quality.flags),
    }
    if pixel_size:
        row["pixel_size_mm"] = pixel_size
    if image.views:
        direct, mirrored = image.views
        row["tta_dice"] = segmentation_metrics(mirrored.mask, direct.mask)["dice"]
    if head is None:
        _, components = largest_region(mask)
        return row | {"components": components}
    ellipse = head.ellipse
    row |= {
        "center_x_px": ellipse.center_x,
        "center_y_px": ellipse.center_y,
        "semi_major_px": ellipse.semi_major,
        "semi_minor_px": ellipse.semi_minor,
        "angle_rad": ellipse.angle,
        "touches_border": head.touches_border,
        "components": head.components,
        "ellipse_agreement": head.ellipse_agreement,
    }
    if not pixel_size:
        return row
    size = head.in_mm(pixel_size)
    row |= {
        "hc_mm": size.circumference,
        "bpd_mm": size.biparietal_diameter,
        "ofd_mm": size.occipitofrontal_diameter,
    }
    heads = [view.head for view in image.views if view.head]
    if len(heads) == 2:
        direct, mirrored = (head.in_mm(pixel_size).circumference for head in heads)
        row["tta_hc_spread_mm"] = abs(direct - mirrored)
    if age := gestational_age(size.circumference):
        row |= {"ga_weeks": age.weeks, "ga_low_weeks": age.low, "ga_high_weeks": age.high}
    return row


def _write(output: Path, image: MeasuredImage, *, save_logits: bool) -> None:
    name = image.source.name
    mask, head, _ = image.assessment
    write_mask(output / "masks" / f"{name}.png", mask)
    drawn = pictures.overlay(image.source.image, prediction=mask)
    if head:
        drawn = pictures.draw_ellipse(drawn, head.ellipse)
    pictures.write_png(output / "overlays" / f"{name}.png", drawn)
    if save_logits:
        npy = io.BytesIO()
        np.save(npy, image.logits)
        write_atomically(output / "logits" / f"{name}.npy", npy.getvalue())
