"""Runs exported files in the runtimes that they are made for, on the CPU."""

from pathlib import Path

import numpy as np

from fetal_flax.export.comparison import Runtime
from fetal_flax.export.extras import needs


def onnx_runtime(file: Path | bytes, channels: int) -> Runtime:
    """Opens an ONNX file in onnxruntime.

    Args:
        file: The file, or what it holds.
        channels: Image channels; grey images are repeated for each.

    Raises:
        InputError: onnxruntime isn't there.
    """
    needs("onnx", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # Errors: of what it optimises it warns.
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    scaled = session.get_inputs()[0].type != "tensor(uint8)"

    def run(images: np.ndarray) -> np.ndarray:
        batch = images[:, None].repeat(channels, axis=1)
        (logits,) = session.run(
            ["logits"], {"image": batch.astype(np.float32) / 255 if scaled else batch}
        )
        return np.asarray(logits)[:, 0]

    return run
