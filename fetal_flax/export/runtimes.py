"""Runs exported files in the runtimes that they are made for, on the CPU."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.export
import numpy as np

from fetal_flax.export.comparison import Runtime
from fetal_flax.export.extras import needs
from fetal_flax.export.settings import InputDtype

Prepare = Callable[[np.ndarray], np.ndarray]
"""From grey images, uint8 (batch, height, width), to what a file takes."""


def to_onnx_input(channels: int, dtype: InputDtype) -> Prepare:
    """Returns what makes an ONNX file's input of images, each repeated for every channel."""
    return lambda images: _as_dtype(images[:, None].repeat(channels, axis=1), dtype)


def onnx_runtime(file: Path | bytes, channels: int, dtype: InputDtype) -> Runtime:
    """Opens an ONNX file in onnxruntime.

    Args:
        file: The file, or what it holds.
        channels: Image channels; grey images are repeated for each.
        dtype: Of the images.

    Raises:
        InputError: onnxruntime isn't there.
    """
    needs("onnx", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # Errors; it warns of what it optimises.
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    prepare = to_onnx_input(channels, dtype)
    return lambda images: np.asarray(session.run(["logits"], {"image": prepare(images)})[0])[:, 0]


def stablehlo_runtime(path: Path, channels: int, dtype: InputDtype) -> Runtime:
    """Loads a StableHLO file into JAX.

    Args:
        path: The file.
        channels: Image channels; grey images are repeated for each.
        dtype: Of the images.
    """
    call = jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)

    def run(images: np.ndarray) -> np.ndarray:
        batch = images[..., None].repeat(channels, axis=-1)
        return np.asarray(call(_as_dtype(batch, dtype)))[..., 0]

    return run


def _as_dtype(images: np.ndarray, dtype: InputDtype) -> np.ndarray:
    return images if dtype == "uint8" else images.astype(np.float32) / 255
