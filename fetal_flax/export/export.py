"""Writes a network to a file for other runtimes, and measures that file before it is kept."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fetal_flax._util.files import replacing
from fetal_flax.checkpoints import Checkpoint, load_checkpoint
from fetal_flax.data.phantoms import make_phantom
from fetal_flax.errors import InputError
from fetal_flax.export import runtimes, web
from fetal_flax.export.comparison import Comparison, Limits, Runtime, compare
from fetal_flax.export.onnx_network import onnx_model
from fetal_flax.export.settings import ExportSettings, Format
from fetal_flax.inference.sources import Image, find_files, read_image
from fetal_flax.models.registry import NETWORKS

LIMITS = {
    "float32": Limits(logit_difference=1e-3, dice=0.9999, circumference_change=1e-3),
    "float16": Limits(logit_difference=0.1, dice=0.995, circumference_change=5e-3),
}
"""By the precision."""


class _Way(NamedTuple):
    """How a format is written, and how its files are run."""

    write: Callable[[Checkpoint, ExportSettings, Path], None]
    open: Callable[[Path, int], Runtime]


def _write_onnx(checkpoint: Checkpoint, settings: ExportSettings, path: Path) -> None:
    path.write_bytes(onnx_model(checkpoint, settings).SerializeToString())


def _write_page(checkpoint: Checkpoint, settings: ExportSettings, path: Path) -> None:
    web.write_page(checkpoint, settings, web.browser_runtime(settings.onnxruntime_web), path)


def _page_runtime(path: Path, channels: int) -> Runtime:
    return runtimes.onnx_runtime(web.network_in_page(path), channels)


_WAYS: dict[Format, _Way] = {
    "onnx": _Way(_write_onnx, runtimes.onnx_runtime),
    "web": _Way(_write_page, _page_runtime),
}


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it is from the network."""

    size_bytes: int
    comparisons: dict[tuple[int, int], Comparison]
    """By the images' height and width, of which there are two where these are free."""


def to_file(
    checkpoint: Checkpoint | Path | str,
    output: Path | str,
    *,
    format: Format = "onnx",
    settings: ExportSettings | None = None,
    data_dir: Path | str | None = None,
    images: int = 20,
) -> ExportReport:
    """Writes a network to a file, runs the file in its runtime, and compares with the network.

    The file appears only once its results are within their limits.

    Args:
        checkpoint: What `load_checkpoint` takes or returned.
        output: The file; overwritten if it is there.
        format: Of the file.
        settings: How it is written.
        data_dir: Folder of images to compare on, or HC18's; None takes phantoms.
        images: How many of them.

    Returns:
        The file's size, and what was compared.

    Raises:
        InputError: There is no network, a package isn't there, there are no images, the file can't
            be written, or it is further from the network than its limits.

    Example:
        >>> report = ff.export.to_file("runs/hc18", "network.onnx", images=2)
        >>> comparison = report.comparisons[64, 96]
        >>> comparison.differing_pixels, comparison.logit_difference < 1e-4
        (0, True)
    """
    settings = settings or ExportSettings()
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint)
    way = _WAYS[format]
    compared_on = _images(data_dir, images)
    with replacing(output) as path:
        way.write(checkpoint, settings, path)
        run = way.open(path, checkpoint.config.in_channels)
        comparisons = {
            size: compare(checkpoint, run, compared_on, size)
            for size in _sizes(checkpoint, settings)
        }
        limits = LIMITS[settings.precision]
        problems = [problem for each in comparisons.values() for problem in limits.problems(each)]
        if problems:
            raise InputError(f"{output} is not written: {'; '.join(problems)}")
        return ExportReport(os.path.getsize(path), comparisons)


def _sizes(checkpoint: Checkpoint, settings: ExportSettings) -> Iterator[tuple[int, int]]:
    """Yields the sizes to compare at: the network's, and another one where it is free."""
    height, width = checkpoint.image_size
    yield height, width
    if settings.free_size:
        divisor = NETWORKS[checkpoint.config.name].divisor
        yield height + divisor, width + 2 * divisor


def _images(folder: Path | str | None, count: int) -> Sequence[Image]:
    """Returns images to compare on: phantoms, or those of a folder, evenly spaced by name."""
    if count < 1:
        raise InputError(f"--images must be at least 1, not {count}")
    if folder is None:
        return [make_phantom(0, index).image for index in range(count)]
    return [read_image(path)[0] for path in spread(image_files(Path(folder)), count)]


def image_files(folder: Path) -> list[Path]:
    """Returns the files of a folder's images, or of HC18's training images in it.

    Raises:
        InputError: There are none.
    """
    training = folder / "training_set"
    return find_files(training if training.is_dir() else folder)


def spread(paths: Sequence[Path], count: int) -> list[Path]:
    """Returns so many of the paths, evenly spaced, or all where there are fewer."""
    count = min(count, len(paths))
    return [paths[index] for index in np.arange(count) * len(paths) // count]
