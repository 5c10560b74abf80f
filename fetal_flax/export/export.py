"""Writes a network to a file for other runtimes, and measures that file before it is kept."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fetal_flax._util.files import replacing
from fetal_flax.checkpoints import Checkpoint, load_checkpoint
from fetal_flax.data.images import resize_image
from fetal_flax.errors import InputError
from fetal_flax.export.comparison import Comparison, Limits, Runtime, compare
from fetal_flax.export.images import images_of, phantoms
from fetal_flax.export.onnx_network import onnx_model
from fetal_flax.export.quantization import quantize
from fetal_flax.export.runtimes import onnx_runtime, stablehlo_runtime, to_onnx_input
from fetal_flax.export.settings import ExportSettings, Format, InputDtype, check_ending
from fetal_flax.export.stablehlo import stablehlo
from fetal_flax.export.web import browser_runtime, network_in_page, write_page
from fetal_flax.models.registry import NETWORKS

CALIBRATION_IMAGES = 48
"""At most."""
LIMITS = {
    "float32": Limits(logit_difference=1e-3, dice=0.9999, circumference_change=1e-3),
    "float16": Limits(logit_difference=0.1, dice=0.995, circumference_change=5e-3),
    "int8": Limits(logit_difference=1, dice=0.97, circumference_change=2e-2),
}
"""By what weights and maps are."""


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

    The file appears only once it is within its limits (`LIMITS`). It computes in float32, or what
    `settings` say, also where the network is trained in bfloat16.

    Args:
        checkpoint: What `load_checkpoint` takes or returned.
        output: The file; overwritten if it is there.
        format: `onnx`; `stablehlo`, which JAX alone loads; or `web`, a page that measures.
        settings: How it is written.
        data_dir: Folder of images to compare on, or HC18's; None takes phantoms.
        images: How many of them.

    Returns:
        The file's size, and what was compared.

    Raises:
        InputError: There is no network, a package isn't there, the settings don't go together, the
            file's ending is another format's, there are no images, the file can't be written, or it
            is beyond a limit.

    Example:
        >>> report = ff.export.to_file("runs/hc18", "network.onnx", images=2)
        >>> comparison = report.comparisons[64, 96]
        >>> comparison.differing_pixels, comparison.logit_difference < 1e-3
        (0, True)
    """
    settings = settings or ExportSettings()
    settings.check(format)
    check_ending(Path(output), format)
    if images < 1:
        raise InputError(f"--images must be at least 1, not {images}")
    checkpoint = in_float32(
        checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
    )
    compared_on = (
        images_of(Path(data_dir), images, flag="--data-dir") if data_dir else phantoms(images)
    )
    way = _WAYS[format]
    with replacing(output) as path:
        way.write(checkpoint, settings, path)
        run = way.open(path, checkpoint.config.in_channels, settings.input_dtype)
        comparisons = {
            size: compare(checkpoint, run, compared_on, size)
            for size in _sizes(checkpoint, settings)
        }
        limits = LIMITS[settings.precision if settings.quantize == "none" else settings.quantize]
        problems = [problem for each in comparisons.values() for problem in limits.problems(each)]
        if problems:
            raise InputError(
                f"{output} would be too far from the network, so it is not written: "
                f"{'; '.join(problems)}; compare on images like those it was trained with "
                "(--data-dir), or choose more precision"
            )
        return ExportReport(os.path.getsize(path), comparisons)


def in_float32(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the same network, computing in float32."""
    model = dataclasses.replace(checkpoint.config, dtype="float32")
    return checkpoint._replace(metadata=dataclasses.replace(checkpoint.metadata, model=model))


def _write_onnx(checkpoint: Checkpoint, settings: ExportSettings, path: Path) -> None:
    model = onnx_model(checkpoint, settings)
    if settings.calibration is None:
        path.write_bytes(model.SerializeToString())
        return
    prepare = to_onnx_input(checkpoint.config.in_channels, settings.input_dtype)
    images = images_of(settings.calibration, CALIBRATION_IMAGES, flag="--calibration")
    resized = (resize_image(image, checkpoint.image_size) for image in images)
    quantize(model, [prepare(image[None]) for image in resized], path)


def _write_stablehlo(checkpoint: Checkpoint, settings: ExportSettings, path: Path) -> None:
    path.write_bytes(stablehlo(checkpoint, settings))


def _write_page(checkpoint: Checkpoint, settings: ExportSettings, path: Path) -> None:
    runtime = browser_runtime(settings.onnxruntime_web)
    _write_onnx(checkpoint, dataclasses.replace(settings, input_dtype="uint8"), path)
    write_page(checkpoint, path.read_bytes(), runtime, path)


def _page_runtime(path: Path, channels: int, dtype: InputDtype) -> Runtime:
    del dtype  # A page's images are uint8.
    return onnx_runtime(network_in_page(path), channels, "uint8")


class _Way(NamedTuple):
    """How a format is written, and how its files are run."""

    write: Callable[[Checkpoint, ExportSettings, Path], None]
    open: Callable[[Path, int, InputDtype], Runtime]


_WAYS: dict[Format, _Way] = {
    "onnx": _Way(_write_onnx, onnx_runtime),
    "stablehlo": _Way(_write_stablehlo, stablehlo_runtime),
    "web": _Way(_write_page, _page_runtime),
}


def _sizes(checkpoint: Checkpoint, settings: ExportSettings) -> Iterator[tuple[int, int]]:
    """Yields the sizes to compare at: the network's, and another one where it is free."""
    height, width = checkpoint.image_size
    yield height, width
    if settings.free_size:
        divisor = NETWORKS[checkpoint.config.name].divisor
        yield height + divisor, width + 2 * divisor
