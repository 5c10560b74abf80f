"""`fetal-flax predict`: masks and overlays of an image or of a folder of images."""

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rich.console
import rich.progress

from fetal_flax.data.images import read_gray
from fetal_flax.errors import InputError
from fetal_flax.evaluation import pictures
from fetal_flax.evaluation.report import write_mask
from fetal_flax.files import write_atomically
from fetal_flax.inference.predictor import Image, NetworkLogits, Predictor, native_mask

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
"""Endings of the files that are taken as images, in lower case."""
ANNOTATION_ENDING = "_Annotation.png"
"""Ends the names of HC18's outlines, which lie among its images."""


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


def predict(
    checkpoint: Path, source: Path, output: Path, *, save_logits: bool = False
) -> PredictReport:
    """Segments an image, or every image of a folder, and writes the results.

    `masks/NAME.png` is the mask at the image's own size, 0 or 255; `overlays/NAME.png` the image
    with the mask's outline. NAME is the file's name without its ending. Files of these names
    that are already there are overwritten, others are left alone. A file that can't be read is
    left out and reported; the others are still processed.

    Args:
        checkpoint: Training workdir or converted directory.
        source: An image, or a folder; of a folder the files directly in it whose names end as
            images do (`SUFFIXES`), in the order of their names, but not HC18's outlines
            (`*_Annotation.png`).
        output: Folder for the results; created if needed.
        save_logits: Also write `logits/NAME.npy`: (height, width) float32 at the network's size,
            before the sigmoid.

    Raises:
        InputError: `source` is or holds no image, two of its files have the same NAME,
            `checkpoint` holds no network, or a result can't be written.
    """
    paths = _find_images(source)
    _check_names_differ(paths)
    predictor = Predictor.from_checkpoint(checkpoint)
    predicted: list[str] = []
    failed: list[str] = []
    readable = _read(paths, failed)
    for (path, image), logits in predictor.segment(readable, lambda source: source.image):
        _write(output, path.stem, image, logits, save_logits=save_logits)
        predicted.append(path.stem)
    return PredictReport(tuple(predicted), tuple(failed))


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


def _write(
    output: Path, name: str, image: Image, logits: NetworkLogits, *, save_logits: bool
) -> None:
    mask = native_mask(logits, image.shape)
    write_mask(output / "masks" / f"{name}.png", mask)
    pictures.write_png(
        output / "overlays" / f"{name}.png", pictures.overlay(image, prediction=mask)
    )
    if save_logits:
        npy = io.BytesIO()
        np.save(npy, logits)
        write_atomically(output / "logits" / f"{name}.npy", npy.getvalue())
