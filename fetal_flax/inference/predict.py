"""`fetal-flax predict`: masks, overlays and measurements of an image or of a folder of images."""

import dataclasses
import io
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from fetal_flax._util.files import csv_bytes, growing_csv, growing_json, write_atomically
from fetal_flax._util.pipeline import map_in_threads
from fetal_flax._util.signals import EndOnSignal
from fetal_flax.checkpoints import shipped
from fetal_flax.config import TestTimeAugmentation
from fetal_flax.errors import InputError, file_name
from fetal_flax.inference.assessment import Measurement
from fetal_flax.inference.segmenter import load
from fetal_flax.inference.sources import (
    Outcome,
    Source,
    find_files,
    pixel_sizes,
    read_sources,
    stored_name,
)
from fetal_flax.measurement.head import largest_region
from fetal_flax.measurement.overlap import segmentation_metrics
from fetal_flax.reporting import pictures
from fetal_flax.reporting.tables import write_mask

MEASUREMENTS: dict[str, int | None] = {
    "name": None,
    "hc_mm": 2,
    "bpd_mm": 2,
    "ofd_mm": 2,
    "ga_weeks": 2,
    "ga_low_weeks": 2,
    "ga_high_weeks": 2,
    "pixel_size_mm": 6,
    "center_x_px": 3,
    "center_y_px": 3,
    "semi_major_px": 3,
    "semi_minor_px": 3,
    "angle_rad": 4,
    "touches_border": None,
    "components": None,
    "ellipse_agreement": 4,
    "confidence": 4,
    "flags": None,
    "tta_dice": 4,
    "tta_hc_spread_mm": 2,
    "network": None,
}
"""Columns of `measurements.csv`, and how many decimals their numbers have there;
docs/measurement.md says what each holds. `measurements.json` has all digits."""
TABLE, JSON_TABLE = "measurements.csv", "measurements.json"


@dataclasses.dataclass(frozen=True)
class PredictReport:
    """What became of the files that were asked for."""

    predicted: tuple[str, ...]
    """The NAME of each image whose results were written."""
    flagged: tuple[str, ...]
    """Those of them that a person should look at."""
    failed: tuple[str, ...]
    """A sentence for each file that couldn't be read, which names it."""
    skipped: Mapping[str, int]
    """What else the folder holds, in plain words, and how often."""


def predict(
    checkpoint: Path,
    source: Path,
    output: Path,
    *,
    pixel_size_csv: Path | None = None,
    pixel_size_mm: float | None = None,
    save_logits: bool = False,
    save_json: bool = False,
    tta: TestTimeAugmentation = "none",
    workers: int | None = None,
) -> PredictReport:
    """Segments an image, or every image of a folder, and writes the results.

    `masks/NAME.png` is the mask at the image's own size, 0 or 255; `overlays/NAME.png` the image
    with the mask's outline and the ellipse that was measured. NAME is the file's name without its
    ending; frames of a DICOM file are numbered. `measurements.csv` has a row for each image: head
    circumference (HC), biparietal and occipitofrontal diameter (BPD, OFD; outer to outer) in
    millimetres and the gestational age where the pixel size is known, the ellipse in pixels, and
    signs of a bad measurement; empty where no head was found. A row is written as soon as its image
    is done, so whatever ends the call, the table is whole; a table that was there before is gone
    when the first image is read. Other files of these names are overwritten, the rest is left
    alone. A file that can't be read, or has the NAME of one before it, is left out and reported;
    the others are still processed. The first SIGINT or SIGTERM ends it.

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
        save_json: Also write `measurements.json`: a list with an object for each row, whose numbers
            have all their digits.
        tta: `flip` averages the probabilities with those of the mirror image.
        workers: Threads for each of reading, measuring and writing; None takes one for each
            processor, at most 16.

    Raises:
        InputError: `source` is or holds no image, the CSV can't be used or lacks one of them, the
            pixel size is no positive number or given beside a CSV, `workers` is less than 1,
            `checkpoint` holds no network, or a result can't be written.
        KeyboardInterrupt: A signal has ended it.
    """
    outcome = Outcome()
    measured = measured_sources(
        checkpoint,
        source,
        outcome,
        pixel_size_csv=pixel_size_csv,
        pixel_size_mm=pixel_size_mm,
        tta=tta,
        workers=workers,
    )
    network = _network_name(checkpoint)

    def write(pair: tuple[Source, Measurement]) -> dict[str, object]:
        image, measurement = pair
        _write(output, image, measurement, save_logits=save_logits)
        return _row(image.name, measurement) | {"network": network}

    names: list[str] = []
    flagged: list[str] = []
    table = growing_csv(output / TABLE, list(MEASUREMENTS))
    try:
        with table, growing_json(output / JSON_TABLE) as json_table, EndOnSignal() as end:
            until_signal = itertools.takewhile(lambda _: not end.received, measured)
            for row in map_in_threads(write, until_signal, workers):
                table.add(csv_bytes([_cells(row)]))
                if save_json:
                    json_table.add(_object(row))
                names.append(str(row["name"]))
                flagged += [names[-1]] * bool(row["flags"])
    except (InputError, KeyboardInterrupt) as error:
        said = f"{error}; " if str(error) else "interrupted: "
        where = f", and their rows in {output / TABLE}" if names else ""
        kind = InputError if isinstance(error, InputError) else KeyboardInterrupt
        raise kind(
            f"{said}the results of {len(names)} images are complete{where} ({outcome.files} files "
            "were to be read)"
        ) from None
    return PredictReport(tuple(names), tuple(flagged), tuple(outcome.failed), outcome.skipped)


def measured_sources(
    checkpoint: Path,
    source: Path,
    outcome: Outcome,
    *,
    pixel_size_csv: Path | None = None,
    pixel_size_mm: float | None = None,
    tta: TestTimeAugmentation = "none",
    workers: int | None = None,
) -> Iterator[tuple[Source, Measurement]]:
    """Yields each image with what the network sees in it.

    Args:
        checkpoint: Training workdir, converted directory, or a shipped network's name.
        source: As in `predict`.
        outcome: Takes what becomes of the files.
        pixel_size_csv: As in `predict`.
        pixel_size_mm: As in `predict`.
        tta: As in `predict`.
        workers: As in `predict`.

    Raises:
        InputError: As `predict`, before the first image.
    """
    paths = find_files(source, outcome.skipped)
    sizes = pixel_sizes(paths, pixel_size_csv, pixel_size_mm)
    segmenter = load(checkpoint, tta=tta, workers=workers)
    return segmenter.measure_each(
        read_sources(paths, sizes, outcome, workers),
        lambda source: source.image,
        lambda source: source.pixel_size_mm,
    )


def _network_name(checkpoint: Path) -> str:
    """Returns how a table names the network that measured: a shipped one without its folder."""
    of_package = checkpoint.parent == shipped.FOLDER
    return file_name(checkpoint.name if of_package else str(checkpoint))


def _cells(row: Mapping[str, object]) -> list[str]:
    """Returns a row of `measurements.csv`; what isn't known is empty."""

    def cell(value: object, decimals: int | None) -> str:
        return f"{value:.{decimals}f}" if isinstance(value, float) else str(value)

    return [cell(row.get(name, ""), decimals) for name, decimals in MEASUREMENTS.items()]


def _object(row: Mapping[str, object]) -> bytes:
    """Returns a row as JSON; what isn't known is null."""
    ordered = {name: row.get(name) for name in MEASUREMENTS}
    return json.dumps(ordered, allow_nan=False, ensure_ascii=False).encode()


def _row(name: str, measurement: Measurement) -> dict[str, object]:
    """Returns a row of `MEASUREMENTS`; what isn't known is absent."""
    head, pixel_size = measurement.head, measurement.pixel_size_mm
    row: dict[str, object] = {
        "name": name,
        "confidence": measurement.quality.confidence,
        "flags": " ".join(measurement.flags),
    }
    if pixel_size:
        row["pixel_size_mm"] = pixel_size
    if measurement.views:
        direct, mirrored = measurement.views
        row["tta_dice"] = segmentation_metrics(mirrored.mask, direct.mask)["dice"]
    if head is None:
        _, components = largest_region(measurement.mask)
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
    row |= {
        "hc_mm": measurement.hc_mm,
        "bpd_mm": measurement.bpd_mm,
        "ofd_mm": measurement.ofd_mm,
    }
    circumferences = [view.hc_mm for view in measurement.views if view.hc_mm is not None]
    if len(circumferences) == 2:
        row["tta_hc_spread_mm"] = abs(circumferences[0] - circumferences[1])
    if age := measurement.gestational_age:
        row |= {"ga_weeks": age.weeks, "ga_low_weeks": age.low, "ga_high_weeks": age.high}
    return row


def _write(output: Path, source: Source, measurement: Measurement, *, save_logits: bool) -> None:
    png, mask = stored_name(source.name, ".png"), measurement.mask
    write_mask(output / "masks" / png, mask)
    drawn = pictures.overlay(source.image, prediction=mask)
    if measurement.head:
        drawn = pictures.draw_ellipse(drawn, measurement.head.ellipse)
    pictures.write_png(output / "overlays" / png, drawn)
    if save_logits:
        npy = io.BytesIO()
        np.save(npy, measurement.logits)
        write_atomically(output / "logits" / stored_name(source.name, ".npy"), npy.getvalue())
