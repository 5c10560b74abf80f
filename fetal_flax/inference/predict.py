"""`fetal-flax predict`: masks, overlays and measurements of an image or of a folder of images."""

import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rich.console
import rich.progress
from jaxtyping import Bool

from fetal_flax import checkpoints
from fetal_flax.data.hc18 import read_pixel_sizes
from fetal_flax.data.images import read_gray
from fetal_flax.errors import InputError
from fetal_flax.evaluation import pictures
from fetal_flax.evaluation.head import OUTLINE_PX, Head, measure_head
from fetal_flax.evaluation.report import write_mask
from fetal_flax.files import csv_bytes, write_atomically
from fetal_flax.inference.predictor import Image, NetworkLogits, Predictor, native_mask

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
"""Endings of the files that are taken as images, in lower case."""
ANNOTATION_ENDING = "_Annotation.png"
"""Ends the names of HC18's outlines, which lie among its images."""
MEASUREMENTS = (
    "name",
    "hc_mm",
    "bpd_mm",
    "ofd_mm",
    "pixel_size_mm",
    "center_x_px",
    "center_y_px",
    "semi_major_px",
    "semi_minor_px",
    "angle_rad",
    "touches_border",
    "components",
)
"""Columns of `measurements.csv`; the angle runs from the image's x axis towards y."""


@dataclasses.dataclass(frozen=True)
class PredictReport:
    """What became of the files that were asked for."""

    predicted: tuple[str, ...]
    """The NAME of each image whose results were written."""
    failed: tuple[str, ...]
    """A sentence for each file that couldn't be read, which names it."""


class _Source(NamedTuple):
    """An image and the file it was read from."""

    path: Path
    image: Image


class MeasuredImage(NamedTuple):
    """An image and what the network sees in it."""

    path: Path
    image: Image
    logits: NetworkLogits
    mask: Bool[np.ndarray, "height width"]
    pixel_size_mm: float | None
    """None where it isn't known; the head is then measured in pixels of 1 mm."""
    head: Head | None


def predict(
    checkpoint: Path,
    source: Path,
    output: Path,
    *,
    pixel_size_csv: Path | None = None,
    save_logits: bool = False,
) -> PredictReport:
    """Segments an image, or every image of a folder, and writes the results.

    `masks/NAME.png` is the mask at the image's own size, 0 or 255; `overlays/NAME.png` the image
    with the mask's outline and the ellipse that was measured. NAME is the file's name without its
    ending. `measurements.csv` has a row for each image: head circumference (HC), biparietal and
    occipitofrontal diameter (BPD, OFD; outer to outer) in millimetres where the pixel size is
    known, and the ellipse in pixels; empty where no head was found. Files of these names that are
    already there are overwritten, others are left alone. A file that can't be read is left out
    and reported; the others are still processed.

    Args:
        checkpoint: Training workdir or converted directory.
        source: An image, or a folder; of a folder the files directly in it whose names end as
            images do (`SUFFIXES`), in the order of their names, but not HC18's outlines
            (`*_Annotation.png`).
        output: Folder for the results; created if needed.
        pixel_size_csv: CSV with the columns `filename` and `pixel size(mm)`, as HC18 has it.
        save_logits: Also write `logits/NAME.npy`: (height, width) float32 at the network's size,
            before the sigmoid.

    Raises:
        InputError: `source` is or holds no image, two of its files have the same NAME, the CSV
            can't be used or lacks one of them, `checkpoint` holds no network, or a result can't
            be written.
    """
    predicted: list[str] = []
    failed: list[str] = []
    rows: list[Sequence[object]] = [MEASUREMENTS]
    for image in measured_images(checkpoint, source, failed, pixel_size_csv=pixel_size_csv):
        _write(output, image, save_logits=save_logits)
        rows.append([image.path.stem, *_measurements(image)])
        predicted.append(image.path.stem)
    if predicted:
        write_atomically(output / "measurements.csv", csv_bytes(rows))
    return PredictReport(tuple(predicted), tuple(failed))


def measured_images(
    checkpoint: Path, source: Path, failed: list[str], *, pixel_size_csv: Path | None = None
) -> Iterator[MeasuredImage]:
    """Yields each image with what the network sees in it.

    Args:
        checkpoint: Training workdir or converted directory.
        source: As in `predict`.
        failed: Takes a sentence for each file that can't be read.
        pixel_size_csv: As in `predict`.

    Raises:
        InputError: As `predict`, before the first image.
    """
    paths = _find_images(source)
    _check_names_differ(paths)
    pixel_sizes = _pixel_sizes(paths, pixel_size_csv)
    variables, description = checkpoints.load(checkpoint)
    predictor = Predictor(description.model, variables, description.image_size)
    outline_px = OUTLINE_PX[description.dataset]
    readable = _read(paths, failed)
    for (path, image), logits in predictor.segment(readable, lambda source: source.image):
        mask = native_mask(logits, image.shape)
        pixel_size = pixel_sizes.get(path.name)
        head = measure_head(mask, pixel_size or 1.0, outline_px=outline_px)
        yield MeasuredImage(path, image, logits, mask, pixel_size, head)


def _find_images(source: Path) -> list[Path]:
    if source.is_dir():
        paths = sorted(path for path in source.iterdir() if _is_wanted(path))
        if not paths:
            raise InputError(f"{source} holds no image: expected files {', '.join(SUFFIXES)}")
        return paths
    if not source.exists():
        raise InputError(f"--input {source} doesn't exist: give an image or a folder of images")
    if source.suffix.lower() not in SUFFIXES:
        raise InputError(f"--input {source} is no image: expected a file {', '.join(SUFFIXES)}")
    return [source]


def _is_wanted(path: Path) -> bool:
    """Whether an entry of a folder is to be read: images, also broken ones, but no outlines."""
    return (
        path.suffix.lower() in SUFFIXES
        and not path.name.endswith(ANNOTATION_ENDING)
        and not path.is_dir()
    )


def _check_names_differ(paths: list[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in paths:
        other = seen.setdefault(path.stem, path)
        if other != path:
            raise InputError(
                f"{other} and {path.name} would both be written as {path.stem}.png: rename one, "
                "or predict them one by one into two folders"
            )


def _read(paths: list[Path], failed: list[str]) -> Iterator[_Source]:
    """Yields the images that can be read; adds to `failed` why others can't."""
    console = rich.console.Console(stderr=True)
    for path in rich.progress.track(paths, "Predicting", console=console):
        try:
            yield _Source(path, read_gray(path))
        except InputError as error:
            failed.append(str(error))


def _pixel_sizes(paths: list[Path], csv_path: Path | None) -> dict[str, float]:
    if csv_path is None:
        return {}
    sizes = read_pixel_sizes(csv_path)
    missing = [path.name for path in paths if path.name not in sizes]
    if missing:
        raise InputError(
            f"{csv_path} has no row for {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            + ": add them, or leave --pixel-size-csv out to measure in pixels"
        )
    return sizes


def _measurements(image: MeasuredImage) -> Sequence[object]:
    """Returns a row of `MEASUREMENTS` behind the name."""
    head, pixel_size = image.head, image.pixel_size_mm
    if head is None:
        return [""] * 3 + [pixel_size or ""] + [""] * 6 + [0]
    millimetres = (
        head.circumference_mm,
        head.biparietal_diameter_mm,
        head.occipitofrontal_diameter_mm,
        pixel_size,
    )
    return [
        *(millimetres if pixel_size else [""] * 4),
        *dataclasses.astuple(head.ellipse),
        head.touches_border,
        head.components,
    ]


def _write(output: Path, image: MeasuredImage, *, save_logits: bool) -> None:
    name = image.path.stem
    write_mask(output / "masks" / f"{name}.png", image.mask)
    drawn = pictures.overlay(image.image, prediction=image.mask)
    if image.head:
        drawn = pictures.draw_ellipse(drawn, image.head.ellipse)
    pictures.write_png(output / "overlays" / f"{name}.png", drawn)
    if save_logits:
        npy = io.BytesIO()
        np.save(npy, image.logits)
        write_atomically(output / "logits" / f"{name}.npy", npy.getvalue())
