"""Images to compare and to calibrate with."""

from collections.abc import Sequence
from pathlib import Path

from fetal_flax.data.hc18 import IMAGES
from fetal_flax.data.phantoms import make_phantom
from fetal_flax.inference.sources import Image, check_image, find_files, read_image


def phantoms(count: int) -> list[Image]:
    """Returns the images of so many phantoms."""
    return [make_phantom(0, index).image for index in range(count)]


def images_of(folder: Path, count: int, *, flag: str) -> list[Image]:
    """Returns so many images of a folder, evenly spaced by name, or all where there are fewer.

    Args:
        folder: Holds images, or HC18's `training_set/`. Of a file with several frames the first
            is taken.
        count: At most.
        flag: Names the folder in errors.

    Raises:
        InputError: There is no such folder or no image in it, or one can't be read or is too small.
    """
    paths = find_files(folder / IMAGES if (folder / IMAGES).is_dir() else folder, flag=flag)
    chosen = _spread(paths, count)
    return [check_image(read_image(path, frame=0)[0], str(path)) for path in chosen]


def _spread(paths: Sequence[Path], count: int) -> list[Path]:
    count = min(count, len(paths))
    return [paths[index * len(paths) // count] for index in range(count)]
