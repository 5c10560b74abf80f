"""`fetal-flax predict`: masks, overlays and measurements of an image or of a folder of images."""

import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fetal_flax import __version__
from fetal_flax._util.files import (
    csv_bytes,
    growing_csv,
    growing_json,
    json_bytes,
    remove_temporaries,
    whole_objects,
    whole_rows,
    write_atomically,
)
from fetal_flax._util.pipeline import map_in_threads
from fetal_flax._util.signals import EndOnSignal
from fetal_flax.checkpoints import Checkpoint, load_checkpoint, shipped
from fetal_flax.checkpoints.integrity import digest_of_arrays
from fetal_flax.config import TestTimeAugmentation
from fetal_flax.errors import InputError, file_name
from fetal_flax.inference.assessment import Measurement
from fetal_flax.inference.segmenter import Segmenter
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
SETTINGS = "settings.json"
"""What the table beside it was measured with."""
_RESULTS = {"masks": ".png", "overlays": ".png", "logits": ".npy"}
"""The folders of what an image gives, and the endings of the files in them."""
_ANEW = "leave --resume out to measure all anew"


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
    resumed: int = 0
    """How many of `predicted` an earlier call has written."""


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
    resume: bool = False,
) -> PredictReport:
    """Segments an image, or every image of a folder, and writes the results.

    `masks/NAME.png` is the mask at the image's own size, 0 or 255; `overlays/NAME.png` the image
    with the mask's outline and the ellipse that was measured. NAME is the file's name without its
    ending; frames of a DICOM file are numbered. `measurements.csv` has a row for each image: head
    circumference (HC), biparietal and occipitofrontal diameter (BPD, OFD; outer to outer) in
    millimetres and the gestational age where the pixel size is known, the ellipse in pixels, and
    signs of a bad measurement; empty where no head was found. A row is written as soon as its image
    is done, so whatever ends the call, the table is whole; a table that was there before is gone
    when the first image is read, unless the call resumes. `settings.json` tells what the table was
    measured with. Other files of these names are overwritten, what a killed call was writing is
    removed, and the rest is left alone. A file that can't be read, or has the NAME of one before
    it, is left out and reported; the others are still processed. The first SIGINT or SIGTERM ends
    it.

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
        resume: Go on with what a call that was ended has left in `output`: images that have a row
            and their files are not measured again, also where their files have changed since. At
            the end all is as if nothing had happened. Where nothing is left, all are measured.

    Raises:
        InputError: `source` is or holds no image, the CSV can't be used or lacks one of them, the
            pixel size is no positive number or given beside a CSV, `workers` is less than 1,
            `checkpoint` holds no network, a result can't be written, or a call that resumes has
            other settings or pixel sizes than the one that was ended.
        KeyboardInterrupt: A signal has ended it.
    """
    outcome, network = Outcome(), load_checkpoint(checkpoint)
    settings = {
        "version": __version__,
        "network": _network_name(checkpoint),
        "network_sha256": digest_of_arrays(network.variables._asdict()),
        "input": file_name(str(source.resolve())),
        "tta": tta,
        "save_logits": save_logits,
        "json": save_json,
    }
    rows, objects = _finished(output, settings) if resume else ([], [])
    remove_temporaries(output, TABLE, JSON_TABLE, SETTINGS)
    for folder in _RESULTS:
        remove_temporaries(output / folder)
    before = {row["name"]: row for row in rows}
    names = [*before]
    flagged = [row["name"] for row in rows if row["flags"]]
    measured = measured_sources(
        network,
        source,
        outcome,
        pixel_size_csv=pixel_size_csv,
        pixel_size_mm=pixel_size_mm,
        tta=tta,
        workers=workers,
        wanted=lambda image: _is_new(image, before),
    )

    def write(pair: tuple[Source, Measurement]) -> dict[str, object]:
        image, measurement = pair
        _write(output, image, measurement, save_logits=save_logits)
        return _row(image.name, measurement) | {"network": settings["network"]}

    table = growing_csv(output / TABLE, list(MEASUREMENTS), [[*row.values()] for row in rows])
    json_table = growing_json(output / JSON_TABLE, objects)
    try:
        with table, json_table, EndOnSignal() as end:
            until_signal = itertools.takewhile(lambda _: not end.received, measured)
            for row in map_in_threads(write, until_signal, workers):
                if not names:
                    write_atomically(output / SETTINGS, json_bytes(settings))
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
            "were to be read)" + "; --resume goes on from there" * bool(names)
        ) from None
    return PredictReport(
        tuple(names), tuple(flagged), tuple(outcome.failed), outcome.skipped, len(rows)
    )


def _finished(
    output: Path, settings: Mapping[str, Any]
) -> tuple[list[dict[str, str]], list[bytes]]:
    """Returns the rows of `measurements.csv`, and their JSON if it is wanted, that may be kept.

    These are the first ones, as far as they are whole and their files are there.

    Raises:
        InputError: They were measured with other settings.
    """
    columns = list(MEASUREMENTS)
    rows = [dict(zip(columns, row, strict=True)) for row in whole_rows(output / TABLE, columns)]
    objects = whole_objects(output / JSON_TABLE) if settings["json"] else []
    if not rows:
        return [], []
    try:
        before = json.loads((output / SETTINGS).read_bytes())
        other = [name for name, value in settings.items() if before[name] != value]
    except (OSError, ValueError, LookupError, TypeError):
        raise InputError(
            f"{output / SETTINGS} doesn't tell what {TABLE} was measured with: {_ANEW}"
        ) from None
    if other:
        raise InputError(
            f"{output} was begun with another {', '.join(other)}: give the same, which "
            f"{SETTINGS} has, or {_ANEW}"
        )

    def has_files(row: Mapping[str, str]) -> bool:
        files = _result_files(output, row["name"], save_logits=settings["save_logits"])
        return all(file.is_file() for file in files)

    whole = [*itertools.takewhile(has_files, rows)]
    if settings["json"]:
        whole = whole[: len(objects)]
    return whole, objects[: len(whole)]


def _is_new(source: Source, before: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether an image has no row yet; one whose pixels were of another size can't be kept."""
    if source.name not in before:
        return True
    size = _cell(source.pixel_size_mm or "", MEASUREMENTS["pixel_size_mm"])
    if size != (measured := before[source.name]["pixel_size_mm"]):
        raise InputError(
            f"{source.path} has pixels of {size or 'unknown size'} now, and was measured with "
            f"{measured or 'none'}: {_ANEW}"
        )
    return False


def measured_sources(
    network: Checkpoint,
    source: Path,
    outcome: Outcome,
    *,
    pixel_size_csv: Path | None = None,
    pixel_size_mm: float | None = None,
    tta: TestTimeAugmentation = "none",
    workers: int | None = None,
    wanted: Callable[[Source], bool] = lambda _: True,
) -> Iterator[tuple[Source, Measurement]]:
    """Yields each image with what the network sees in it.

    Args:
        network: What `load_checkpoint` returned.
        source: As in `predict`.
        outcome: Takes what becomes of the files.
        pixel_size_csv: As in `predict`.
        pixel_size_mm: As in `predict`.
        tta: As in `predict`.
        workers: As in `predict`.
        wanted: Whether to measure an image that was read.

    Raises:
        InputError: As `predict`, before the first image.
    """
    paths = find_files(source, outcome.skipped)
    sizes = pixel_sizes(paths, pixel_size_csv, pixel_size_mm)
    segmenter = Segmenter(network, tta=tta, workers=workers)
    sources = read_sources(paths, sizes, outcome, workers)
    return segmenter.measure_each(
        filter(wanted, sources),
        lambda source: source.image,
        lambda source: source.pixel_size_mm,
    )


def _network_name(checkpoint: Path) -> str:
    """Returns how a table names the network that measured: a shipped one without its folder."""
    of_package = checkpoint.parent == shipped.FOLDER
    return file_name(checkpoint.name if of_package else str(checkpoint))


def _cells(row: Mapping[str, object]) -> list[str]:
    """Returns a row of `measurements.csv`; what isn't known is empty."""
    return [_cell(row.get(name, ""), decimals) for name, decimals in MEASUREMENTS.items()]


def _cell(value: object, decimals: int | None) -> str:
    return f"{value:.{decimals}f}" if isinstance(value, float) else str(value)


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


def _result_files(output: Path, name: str, *, save_logits: bool) -> list[Path]:
    """Returns the files of an image: mask, overlay and, if they are saved, logits."""
    files = [output / folder / stored_name(name, ending) for folder, ending in _RESULTS.items()]
    return files[: 2 + save_logits]


def _write(output: Path, source: Source, measurement: Measurement, *, save_logits: bool) -> None:
    files = _result_files(output, source.name, save_logits=save_logits)
    write_mask(files[0], measurement.mask)
    drawn = pictures.overlay(source.image, prediction=measurement.mask)
    if measurement.head:
        drawn = pictures.draw_ellipse(drawn, measurement.head.ellipse)
    pictures.write_png(files[1], drawn)
    if save_logits:
        npy = io.BytesIO()
        np.save(npy, measurement.logits)
        write_atomically(files[2], npy.getvalue())
