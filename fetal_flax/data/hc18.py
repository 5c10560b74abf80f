"""HC18 as it is published: a folder of images, their outlines, and a CSV of measurements.

    training_set/000_HC.png, 000_HC_Annotation.png, 010_2HC.png, ...
    training_set_pixel_size_and_HC.csv

The number before the underscore is the examination; some have two to four images.
(van den Heuvel et al., "Automated measurement of fetal head circumference using 2D ultrasound
images", PLOS ONE 2018; Zenodo record 1327317, CC BY 4.0.)
"""

import concurrent.futures
import csv
import dataclasses
import hashlib
import math
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from fetal_flax._util.console import track
from fetal_flax._util.download import fetch
from fetal_flax._util.machine import available_cpus
from fetal_flax.data.images import read_gray
from fetal_flax.data.masks import fill_outline
from fetal_flax.errors import InputError, printable

IMAGES = "training_set"
CSV = "training_set_pixel_size_and_HC.csv"
MOST_MM = 1000
"""No pixel and no head is that large."""

_URL = "https://zenodo.org/api/records/1327317/files/{}/content"
_FILES = {
    CSV: (33688, "1c08fa81c374c5f9509f3aa6a6568e4dc6cc5434ff82d0df731db7e4f25816b3"),
    f"{IMAGES}.zip": (
        132926838,
        "fd20d7909df892cfbdc0850de18072dbdad4dc3bc0a57202d4cc818d4715de36",
    ),
}
_IMAGE_NAME = re.compile(r"(\d+)_\d*HC\.png")
_COLUMNS = ("filename", "pixel size(mm)", "head circumference (mm)")
_PROBLEMS_NAMED = 10


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

    Raises:
        InputError: The layout is another, or images are unreadable, without an annotation that
            can be filled, of another size than it, or without a row in the CSV. One error names
            them all (the first ten).
    """
    images, csv_path = _locate(Path(folder))
    rows, problems = _read_rows(csv_path)
    records = []
    for path in sorted(images.iterdir()):
        match = _IMAGE_NAME.fullmatch(path.name)
        if not match:
            continue
        try:
            records.append(_record(path, match[1], rows))
        except InputError as error:
            problems.append(f"{path.name} {error}")
    if not records and not problems:
        raise InputError(f"{images} holds no HC18 image (NNN_HC.png)")
    problems += _loading_problems(records)
    if problems:
        named = "; ".join(problems[:_PROBLEMS_NAMED])
        more = len(problems) - _PROBLEMS_NAMED
        raise InputError(
            f"{len(problems)} problem(s) in {folder}: {named}"
            + (f"; and {more} more" if more > 0 else "")
        )
    return tuple(records)


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


def read_pixel_sizes(csv_path: Path) -> dict[str, float]:
    """Returns the pixel size in mm by file name, from a CSV as HC18 has them.

    Raises:
        InputError: The file can't be read, has other columns, a name twice, or a size that is no
            positive number.
    """
    rows, problems = _read_rows(csv_path, _COLUMNS[:2])
    sizes = {}
    for name, row in rows.items():
        try:
            sizes[name] = _positive(row, _COLUMNS[1], csv_path.name)
        except InputError as error:
            problems.append(f"{printable(name)} {error}")
    if problems:
        raise InputError(f"{csv_path}: {'; '.join(problems[:_PROBLEMS_NAMED])}")
    return sizes


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


def download(cache_dir: Path) -> Path:
    """Downloads the official training set once and returns its folder.

    Raises:
        InputError: A file can't be fetched; the message says how to do without.
    """
    folder = cache_dir / "downloads" / "hc18"
    try:
        for name, (size, sha256) in _FILES.items():
            fetch(_URL.format(name), folder / name, sha256=sha256, size=size)
    except InputError as error:
        raise InputError(
            f"{error}; or unpack HC18 (https://zenodo.org/records/1327317) anywhere, run"
            " `fetal-flax data prepare --source DIR` and train with `--data.data-dir DIR`"
        ) from None
    if not (folder / IMAGES).is_dir():
        _unpack(folder / f"{IMAGES}.zip", folder)
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    """Unpacks the archive's `training_set/` into `folder`, whole or not at all."""
    unfinished = folder / f"unpacking-{os.getpid()}"
    with zipfile.ZipFile(archive) as zipped:
        zipped.extractall(unfinished)
    (unfinished / IMAGES).rename(folder / IMAGES)
    unfinished.rmdir()


def _locate(folder: Path) -> tuple[Path, Path]:
    """Returns the folder of the images and the path of the CSV."""
    if not folder.is_dir():
        raise InputError(f"no such HC18 folder: {folder}")
    images = folder / IMAGES if (folder / IMAGES).is_dir() else folder
    for csv_path in (folder / CSV, images / CSV, images.parent / CSV):
        if csv_path.is_file():
            return images, csv_path
    raise InputError(f"{folder} is no HC18 folder: expected {IMAGES}/ and {CSV} in it")


def _read_rows(
    path: Path, columns: Sequence[str] = _COLUMNS
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Returns the CSV's rows by file name, and what is wrong with them."""
    try:
        if path.exists() and not path.is_file():  # A pipe would wait for ever.
            raise InputError(f"can't read {path}: give a regular file")
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{path} has no column {', '.join(map(repr, missing))}")
            rows, problems = {}, []
            for row in reader:
                name = row["filename"] or ""  # None where the row is too short.
                if name in rows:
                    problems.append(f"{printable(name)} has two rows in {path.name}")
                rows[name] = row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"can't read {path}: {error}") from None
    return rows, problems


def _record(path: Path, examination: str, rows: dict[str, dict[str, str]]) -> HC18Record:
    """Builds the record of one image; the message of its InputError is to follow the name."""
    annotation = path.with_name(f"{path.stem}_Annotation.png")
    if not annotation.is_file():
        raise InputError(f"has no {annotation.name} beside it")
    if path.name not in rows:
        raise InputError(f"has no row in {CSV}")
    pixel_size, circumference = (_positive(rows[path.name], name) for name in _COLUMNS[1:])
    return HC18Record(path.stem, examination, path, annotation, pixel_size, circumference)


def _positive(row: dict[str, str], column: str, csv_name: str = CSV) -> float:
    """Returns a column of a row of the CSV as a positive number of millimetres."""
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value < MOST_MM:
        raise InputError(
            f"has {printable(repr(row[column]))} as its {column} in {csv_name}, not a positive "
            f"number below {MOST_MM}"
        )
    return value


def _loading_problems(records: list[HC18Record]) -> list[str]:
    """Loads every record and returns the messages of those that fail."""

    def problem(record: HC18Record) -> str | None:
        try:
            load(record)
        except InputError as error:
            return str(error)
        return None

    with concurrent.futures.ThreadPoolExecutor(available_cpus()) as pool:
        messages = track(pool.map(problem, records), "Checking HC18", len(records))
        return [message for message in messages if message]
