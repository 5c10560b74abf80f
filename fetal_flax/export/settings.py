"""What an exported file can be."""

import dataclasses
from pathlib import Path
from typing import Literal

Format = Literal["onnx", "web"]
"""ONNX, or a page that measures in a browser."""


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """How a network is written."""

    input_dtype: Literal["float32", "uint8"] = "float32"
    """What the images are: float32 in [0, 1], or uint8 of 0 to 255, which the file scales."""
    free_size: bool = False
    """Whether height and width are free multiples of what the network divides by, instead of those
    that it was trained at. Kernels whose outer taps read only padding at that size are then
    written whole."""
    precision: Literal["float32", "float16"] = "float32"
    """Dtype of weights and maps; the logits are float32 in any case."""
    onnxruntime_web: Path | None = None
    """For a page: the npm package onnxruntime-web, as `npm pack` makes it or unpacked; by default
    npm fetches it."""
