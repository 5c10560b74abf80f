"""Images to compare and to calibrate with."""

from collections.abc import Sequence
from pathlib import Path

from fetal_flax.data.hc18 import IMAGES
from fetal_flax.data.phantoms import make_phantom
from fetal_flax.inference.sources import Image, find_files, read_image


def phantoms(count: int) -> list[Image]:
    """Returns the images of so many phantoms."""
    return [make_phantom(0, index).image for index in range(count)]


def images_of(folder: Path, count: int) -> list[Image]:
    """Returns so many images of a folder, evenly spaced by name, or all where there are fewer.

    Args:
        folder: Holds images, or HC18's `training_set/`.
        count: At most.

    Raises:
        InputError: There is no such folder or no image in it, or one can't be read.
    """
    paths = find_files(folder / IMAGES if (folder / IMAGES).is_dir() else folder)
    return [read_image(path)[0] for path in _spread(paths, count)]


def _spread(paths: Sequence[Path], count: int) -> list[Path]:
    count = min(count, len(paths))
    return [paths[index * len(paths) // count] for index in range(count)]
