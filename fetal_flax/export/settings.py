"""What an exported file can be."""

import dataclasses
from pathlib import Path
from typing import Literal

from fetal_flax.errors import InputError

Format = Literal["onnx", "stablehlo", "web"]
InputDtype = Literal["float32", "uint8"]
ENDINGS: dict[str, Format] = {
    ".onnx": "onnx",
    ".stablehlo": "stablehlo",
    ".html": "web",
    ".htm": "web",
}
"""What files are usually called, in lower case."""


def check_ending(output: Path, format: Format) -> None:
    """Refuses to write one format under the ending of another.

    Raises:
        InputError: The ending is another format's, or that of LiteRT, which there is no format for.
    """
    ending = output.suffix.lower()
    if ending == ".tflite":
        raise InputError(
            f"{output} would be LiteRT, which isn't written here: docs/deploy.md says how to make "
            "it of an ONNX file"
        )
    if ENDINGS.get(ending, format) != format:
        raise InputError(
            f"{output} would be {format}, but {ending} is what files of --format "
            f"{ENDINGS[ending]} are called: give that format, or another ending"
        )


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """How a network is written."""

    input_dtype: InputDtype = "float32"
    """What the images are: float32 in [0, 1], or uint8 of 0 to 255, which the file scales."""
    free_size: bool = False
    """Whether height and width are free multiples of what the network divides by, instead of those
    that it was trained at. Kernels whose outer taps read only padding at that size are then
    written whole. ONNX only."""
    precision: Literal["float32", "float16"] = "float32"
    """Dtype of weights and maps; the logits are float32 in any case. float16 is ONNX only."""
    quantize: Literal["none", "int8"] = "none"
    """int8 stores and computes in 8 bits what can be. ONNX and pages only."""
    calibration: Path | None = None
    """Folder of images, or HC18 folder, that tell int8 how large each map's values are: like those
    that will be measured, and some 50 of them; of more, so many evenly spaced ones are taken."""
    onnxruntime_web: Path | None = None
    """For a page: the npm package onnxruntime-web, as `npm pack` makes it or unpacked; by default
    npm fetches it."""

    def check(self, format: Format) -> None:
        """Refuses settings that don't go together.

        Raises:
            InputError: The format doesn't have one of them, or int8 lacks images or comes with
                float16.
        """
        only_onnx = {
            "--free-size": self.free_size,
            "--precision float16": self.precision == "float16",
        }
        for flag, given in only_onnx.items():
            if given and format != "onnx":
                raise InputError(f"{flag} is for --format onnx alone: leave it out")
        if self.quantize == "int8" and format not in ("onnx", "web"):
            raise InputError("--quantize int8 is for --format onnx and web alone: leave it out")
        if self.onnxruntime_web is not None and format != "web":
            raise InputError("--onnxruntime-web is for --format web alone: leave it out")
        if self.quantize == "none":
            if self.calibration is not None:
                raise InputError("--calibration is for --quantize int8 alone: leave it out")
            return
        if self.precision == "float16":
            raise InputError("--quantize int8 starts from float32: leave --precision out")
        if self.calibration is None:
            raise InputError(
                "--quantize int8 needs --calibration FOLDER: some 50 images like those that will "
                "be measured"
            )
