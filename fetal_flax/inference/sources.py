"""Images to measure: which files, their names, their pixels."""

import dataclasses
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from fetal_flax._util.console import track
from fetal_flax._util.pipeline import in_threads
from fetal_flax.data import dicom
from fetal_flax.data.hc18 import MOST_MM, read_pixel_sizes
from fetal_flax.data.images import SUFFIXES as IMAGE_SUFFIXES
from fetal_flax.data.images import check_is_file, read_gray
from fetal_flax.errors import InputError, file_name, printable

Image = UInt8[np.ndarray, "_height _width"]

SUFFIXES = (*IMAGE_SUFFIXES, *dicom.SUFFIXES)
"""Endings of the files that are taken as images, in lower case; DICOM files need none."""
ANNOTATION_ENDING = "_Annotation.png"
"""Ends the names of HC18's outlines, which lie among its images."""
SMALLEST_SIDE_PX = 16
"""Smaller images can't show a head."""
_LONGEST_NAME = 240
"""Bytes of a result's name: file systems take 255, ending and a frame's number included."""


class Source(NamedTuple):
    """An image and where it comes from."""

    path: Path
    name: str
    """Of the results: the file's name without its ending; with `_0001` ... for frames. What is no
    UTF-8 in it is escaped, and a long one is cut."""
    image: Image
    pixel_size_mm: float | None
    """None where neither the CSV nor the file tells it."""


@dataclasses.dataclass
class Outcome:
    """What became of the files of a folder, filled while they are read."""

    files: int = 0
    """How many were to be read."""
    done: int = 0
    """How many of them are behind."""
    failed: list[str] = dataclasses.field(default_factory=list)
    """A sentence for each that can't be read, or whose results would overwrite another's."""
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    """What else the folder holds, in plain words, and how often."""


def read_image(
    path: str | os.PathLike[str], *, frame: int | None = None
) -> tuple[Image, float | None]:
    """Reads an image file, and how large its pixels are where it tells.

    Args:
        path: PNG, JPEG, BMP, TIFF, WebP, GIF or DICOM (which needs the extra `dicom`). Colour
            becomes grey, 16 bits become 8, an EXIF orientation is applied.
        frame: Which frame of a DICOM file that holds several, counted from 0.

    Returns:
        The grey image, uint8, (height, width), and the side of a pixel in mm; None for all but
        DICOM files, and where one has no calibration.

    Raises:
        InputError: There is no such file or frame, it is no image, it can't be read, or it holds
            several frames and none is named.

    Example:
        >>> image, pixel_size_mm = ff.read_image("scan.png")
        >>> image.shape, image.dtype, pixel_size_mm
        ((180, 240), dtype('uint8'), None)
    """
    path = Path(path)
    sources = itertools.islice(_read(path, None), frame or 0, None)
    source = next(sources, None)
    if source is None:
        raise InputError(f"{path} has no frame {frame}: count from 0")
    if frame is None and next(sources, None) is not None:
        raise InputError(f"{path} holds several frames: name one, such as frame=0")
    return source.image, source.pixel_size_mm


def check_image(image: Image, name: str = "an image") -> Image:
    """Returns the image.

    Args:
        image: To be measured.
        name: How errors name it.

    Raises:
        InputError: It isn't grey, isn't uint8, or is too small to show a head.
    """
    if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 2):
        kind = f"{image.dtype} with shape {image.shape}" if hasattr(image, "dtype") else type(image)
        raise InputError(
            f"{name} is {kind}: give grey uint8 (height, width), such as read_image returns"
        )
    height, width = image.shape
    if min(height, width) < SMALLEST_SIDE_PX:
        raise InputError(
            f"{name} has {width}×{height} pixels, too few to show a head: give the whole image"
        )
    return image


def check_pixel_size(size_mm: float, name: str = "a pixel size of") -> float:
    """Returns the side of a pixel.

    Raises:
        InputError: It is no positive number of mm below `MOST_MM`.
    """
    if not 0 < size_mm < MOST_MM:
        raise InputError(f"{name} {size_mm:g} is not a positive number of mm below {MOST_MM}")
    return size_mm


def find_files(
    source: Path, skipped: Counter[str] | None = None, *, flag: str = "--input"
) -> list[Path]:
    """Returns the files to read: `source` itself, or what lies directly in the folder.

    Broken files are among them, and whatever else is named like an image, so that they can be
    reported; HC18's outlines, hidden files and files of other kinds are not.

    Args:
        source: A file or a folder.
        skipped: Counts what is left out, in plain words.
        flag: Names `source` in errors.

    Raises:
        InputError: `source` isn't there, isn't an image's file or holds none.
    """
    skipped = Counter() if skipped is None else skipped
    if not source.is_dir():
        if not source.exists():
            raise InputError(f"{flag} {source} doesn't exist: give an image or a folder of images")
        if not _looks_like_image(source):
            raise InputError(f"{flag} {source} is no image: expected DICOM or {_endings()}")
        return [source]
    paths = []
    for path in sorted(source.iterdir()):
        if kind := _kind_of_other(path):
            skipped[kind] += 1
        else:
            paths.append(path)
    if not paths:
        besides = f" (but {listed(skipped)})" if skipped else ""
        raise InputError(
            f"{source} holds no image{besides}: expected DICOM files or {_endings()} directly in it"
        )
    return paths


def listed(skipped: Mapping[str, int]) -> str:
    """Returns what was counted, as words: `hidden file (2), folder (1)`."""
    return ", ".join(f"{kind} ({count})" for kind, count in sorted(skipped.items()))


def _kind_of_other(path: Path) -> str:
    """Returns what a folder's entry is, in plain words, or nothing where it is to be read."""
    if path.name.startswith("."):
        return "hidden file"
    if path.name.endswith(ANNOTATION_ENDING):
        return "HC18 outline"
    if _looks_like_image(path):
        return ""
    if path.is_dir():
        return "folder"
    ending = printable(file_name(path.suffix.lower()))
    return f"{ending} file" if ending else "file without an ending"


def pixel_sizes(
    paths: Sequence[Path], csv_path: Path | None, size_mm: float | None = None
) -> Mapping[str, float]:
    """Returns the pixel sizes in mm that a CSV gives, by file name, or one for all.

    Args:
        paths: What `find_files` returned.
        csv_path: The CSV, if any.
        size_mm: The one size, if any.

    Raises:
        InputError: The CSV can't be used, or lacks an image that isn't DICOM; the one size is no
            size; or both are given.
    """
    if size_mm is not None:
        if csv_path is not None:
            raise InputError("--pixel-size and --pixel-size-csv are both given: leave one out")
        check_pixel_size(size_mm, "--pixel-size")
        return dict.fromkeys((path.name for path in paths), size_mm)
    if csv_path is None:
        return {}
    sizes = read_pixel_sizes(csv_path, [path.name for path in paths])
    missing = [
        printable(file_name(path.name))
        for path in paths
        if path.name not in sizes and path.is_file() and not dicom.is_dicom(path)
    ]
    if missing:
        raise InputError(
            f"{csv_path} has no row for {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            + ": add them, or leave --pixel-size-csv out to measure in pixels"
        )
    return sizes


def read_sources(
    paths: Sequence[Path],
    sizes: Mapping[str, float],
    outcome: Outcome,
    workers: int | None = None,
) -> Iterator[Source]:
    """Yields the images that can be read, in order; threads read files ahead.

    Args:
        paths: What `find_files` returned.
        sizes: What `pixel_sizes` returned; it goes before what a DICOM file says.
        outcome: Takes what becomes of each file; no file costs the others their results.
        workers: Threads that read; None takes one for each processor, at most 16.
    """
    taken: dict[str, Path] = {}
    outcome.files = len(paths)
    readings = in_threads(lambda path: _begin(path, sizes.get(path.name)), paths, workers)
    for path, reading in zip(track(paths, "Predicting"), readings, strict=True):
        try:
            for source in reading.result():
                _check_usable(source, taken)
                taken[source.name] = path
                yield source
        except dicom.NoImageError as error:
            if len(paths) == 1:
                outcome.failed.append(str(error))
            else:
                outcome.skipped[error.kind] += 1
        except InputError as error:
            outcome.failed.append(str(error))
        except Exception as error:  # Whatever a reader's own reader lets through.
            why = printable(" ".join(f"{type(error).__name__}: {error}".split()))
            outcome.failed.append(f"{path} can't be read ({why}): copy or export it again")
        outcome.done += 1


def _begin(path: Path, size: float | None) -> Iterator[Source]:
    """Returns a file's images, the first of them read; a clip's frames would fill the memory."""
    images = _read(path, size)
    return itertools.chain([*itertools.islice(images, 1)], images)


def _read(path: Path, size: float | None) -> Iterator[Source]:
    check_is_file(path)
    if not (dicom.is_dicom(path) or path.suffix.lower() in dicom.SUFFIXES):
        yield Source(path, _name(path), read_gray(path), size)
        return
    file = dicom.DicomFile(path)
    size = file.pixel_size_mm if size is None else size
    for number, image in enumerate(file.frames(), 1):
        suffix = f"_{number:04d}" if file.frame_count > 1 else ""
        yield Source(path, _name(path) + suffix, image, size)


def stored_name(name: str, ending: str) -> str:
    """Returns the name of a result's file, as the file system takes it."""
    return os.fsdecode(f"{name}{ending}".encode())


def _check_usable(source: Source, taken: Mapping[str, Path]) -> None:
    if source.name in taken:
        raise InputError(
            f"{source.path} would be written as {source.name}.png, as {taken[source.name].name} "
            "is: rename one"
        )
    check_image(source.image, str(source.path))


def _looks_like_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES or dicom.is_dicom(path)


def _name(path: Path) -> str:
    # DICOM files without an ending are often called by a UID, whose last number is none.
    name = file_name(path.stem if path.suffix.lower() in SUFFIXES else path.name)
    encoded = name.encode()
    if len(encoded) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return encoded[: _LONGEST_NAME - 9].decode(errors="ignore") + "~" + digest


def _endings() -> str:
    return ", ".join(SUFFIXES)
