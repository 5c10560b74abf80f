"""ONNX models in 8 bits, by onnxruntime's static quantisation.

Weights are quantised per output channel, maps per tensor, by what they are on calibration images.
`docs/deploy.md` has what other ways cost in Dice and millimetres.
"""

import contextlib
import copy
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fetal_flax.export.extras import needs

if TYPE_CHECKING:
    import onnx

PERCENTILE = 99.99
"""Of a map's values, how many its 8 bits reach; the rest is clipped. The few largest values of all
images would coarsen the steps of all others."""
OPERATORS = (
    *("Conv", "ConvTranspose", "Relu", "Clip", "MaxPool", "Concat", "Add", "Mul"),
    *("GlobalAveragePool", "Sigmoid"),
)
"""What is quantised, activations among it: a convolution whose output is quantised before its ReLU
spends half of the steps on what the ReLU drops."""


def quantize(model: "onnx.ModelProto", batches: Sequence[np.ndarray], path: Path) -> None:
    """Writes a model in 8 bits.

    Args:
        model: In float32.
        batches: Calibration images, as the model takes them.
        path: File to write.

    Raises:
        InputError: onnxruntime isn't there.
    """
    needs("onnx", "onnxruntime")
    import onnx
    from onnxruntime import quantization

    class Calibration(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            return None if batch is None else {"image": batch}

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # It asks for a preparation that finds nothing to do here.
    try:
        # It prints what it does.
        with contextlib.redirect_stdout(io.StringIO()):
            quantization.quantize_static(
                copy.deepcopy(model),  # It moves the weights out of the one it is given.
                path,
                Calibration(),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=[*OPERATORS],
                per_channel=True,
                weight_type=quantization.QuantType.QInt8,
                activation_type=quantization.QuantType.QUInt8,
                calibrate_method=quantization.CalibrationMethod.Percentile,
                extra_options={"CalibPercentile": PERCENTILE},
            )
    finally:
        root.setLevel(level)
    quantized = onnx.load(path)
    quantized.metadata_props.extend(model.metadata_props)
    onnx.save(quantized, path)
