"""HC18's folder: its layout, its annotated images, and what is wrong with them."""

import concurrent.futures
import dataclasses
import hashlib
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from fetal_flax._util.console import track
from fetal_flax._util.machine import available_cpus
from fetal_flax.data.hc18.measurements import (
    COLUMNS,
    CSV,
    PROBLEMS_NAMED,
    find_rows,
    positive_mm,
    read_rows,
)
from fetal_flax.data.hc18.outlines import contradiction, fill_outline
from fetal_flax.data.images import read_gray
from fetal_flax.errors import InputError, InputWarning

IMAGES = "training_set"
_IMAGE_NAME = re.compile(r"(\d+)_\d*HC\.png")


@dataclasses.dataclass(frozen=True)
class HC18Record:
    """One annotated image."""

    name: str
    """File name without `.png`, such as `010_2HC`."""
    examination: str
    """The number before the underscore, such as `010`."""
    image_path: Path
    annotation_path: Path
    pixel_size_mm: float
    head_circumference_mm: float


def find_records(folder: Path | str) -> tuple[HC18Record, ...]:
    """Finds and checks the annotated images of an HC18 folder, complete or a subset.

    Args:
        folder: Holds `training_set/` and the CSV; or is `training_set` itself, with the CSV
            beside it or inside.

    Returns:
        The images, sorted by name.

    Warns:
        InputWarning: A row of the CSV contradicts its image's annotation.

    Raises:
        InputError: The layout is another, or images are unreadable, without an annotation that
            can be filled, of another size than it, or without a row in the CSV. One error names
            them all (the first ten).
    """
    images, csv_path = _locate(Path(folder))
    rows, faults = read_rows(csv_path)
    records: list[HC18Record] = []
    paths = [path for path in sorted(images.iterdir()) if _IMAGE_NAME.fullmatch(path.name)]
    rows = find_rows(rows, [path.name for path in paths])
    problems = [problem for name, problem in faults if name in rows]
    for path in paths:
        match = _IMAGE_NAME.fullmatch(path.name)
        assert match
        try:
            records.append(_record(path, match[1], rows))
        except InputError as error:
            problems.append(f"{path.name} {error}")
    if not records and not problems:
        raise InputError(f"{images} holds no HC18 image (NNN_HC.png)")
    loaded, contradictions = _load_all(records)
    problems += loaded
    if problems:
        named = "; ".join(problems[:PROBLEMS_NAMED])
        more = len(problems) - PROBLEMS_NAMED
        raise InputError(
            f"{len(problems)} problem(s) in {folder}: {named}"
            + (f"; and {more} more" if more > 0 else "")
        )
    if contradictions:
        warn_of_contradictions(folder, contradictions)
    return tuple(records)


def warn_of_contradictions(folder: Path | str | None, contradictions: Sequence[str]) -> None:
    """Warns of images whose annotation and row in the CSV contradict each other.

    Args:
        folder: The data set's, if it is known.
        contradictions: A sentence for each image, without its end.
    """
    more = len(contradictions) - PROBLEMS_NAMED
    sentence = (
        f"{folder or 'HC18'}: outline and CSV contradict each other in {len(contradictions)} "
        f"image(s), see to pixel sizes, circumferences and annotations: "
        f"{'; '.join(contradictions[:PROBLEMS_NAMED])}"
    )
    more_words = f"; and {more} more" if more > 0 else ""
    warnings.warn(InputWarning(sentence + more_words), stacklevel=3)


def load(
    record: HC18Record,
) -> tuple[UInt8[np.ndarray, "height width"], UInt8[np.ndarray, "height width"]]:
    """Returns a record's image and its filled mask (0/255), both at native size.

    Raises:
        InputError: One of the files can't be read or filled, or their sizes differ.
    """
    image = read_gray(record.image_path)
    outline = read_gray(record.annotation_path)
    if image.shape != outline.shape:
        raise InputError(
            f"{record.image_path} has {image.shape} pixels and its annotation {outline.shape}"
        )
    try:
        return image, fill_outline(outline)
    except InputError as error:
        raise InputError(f"{record.annotation_path} {error}") from None


def fingerprint(folder: Path | str) -> str:
    """Returns 16 hex digits that change with the folder's files (names, sizes, times) or CSV.

    Raises:
        InputError: The folder has another layout.
    """
    images, csv_path = _locate(Path(folder))
    digest = hashlib.sha256(csv_path.read_bytes())
    for entry in sorted(os.scandir(images), key=lambda entry: entry.name):
        try:
            facts = entry.stat()
        except OSError:  # A link to nowhere; an image of such a name is refused later.
            facts = entry.stat(follow_symlinks=False)
        # Names need not be UTF-8.
        digest.update(os.fsencode(f"{entry.name}\0{facts.st_size}\0{facts.st_mtime_ns}\n"))
    return digest.hexdigest()[:16]


def _locate(folder: Path) -> tuple[Path, Path]:
    """Returns the folder of the images and the path of the CSV."""
    if not folder.is_dir():
        raise InputError(
            f"no such HC18 folder: {folder}; give the right one (train: --data.data-dir, evaluate: "
            "--data-dir, data prepare: --source)"
        )
    images = folder / IMAGES if (folder / IMAGES).is_dir() else folder
    for csv_path in (folder / CSV, images / CSV, images.parent / CSV):
        if csv_path.is_file():
            return images, csv_path
    raise InputError(f"{folder} is no HC18 folder: expected {IMAGES}/ and {CSV} in it")


def _record(path: Path, examination: str, rows: dict[str, dict[str, str]]) -> HC18Record:
    """Builds the record of one image; the message of its InputError is to follow the name."""
    annotation = path.with_name(f"{path.stem}_Annotation.png")
    if not annotation.is_file():
        raise InputError(f"has no {annotation.name} beside it")
    if path.name not in rows:
        raise InputError(f"has no row in {CSV}")
    pixel_size, circumference = (positive_mm(rows[path.name], name) for name in COLUMNS[1:])
    return HC18Record(path.stem, examination, path, annotation, pixel_size, circumference)


def _load_all(records: list[HC18Record]) -> tuple[list[str], list[str]]:
    """Loads every record; returns the messages of those that fail, and of contradictions."""

    def look(record: HC18Record) -> tuple[str | None, str | None]:
        try:
            _, mask = load(record)
        except InputError as error:
            return str(error), None
        wrong = contradiction(mask > 0, record.pixel_size_mm, record.head_circumference_mm)
        return None, wrong and f"{record.image_path.name} {wrong}"

    with concurrent.futures.ThreadPoolExecutor(available_cpus()) as pool:
        looks = list(track(pool.map(look, records), "Checking HC18", len(records)))
    failures, contradictions = zip(*looks, strict=True) if looks else ((), ())
    return [*filter(None, failures)], [*filter(None, contradictions)]
