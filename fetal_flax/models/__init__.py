"""The networks: pure Flax NNX code that knows nothing of data or training.

Blocks are built from plain arguments and stand alone; `create_model` builds a whole network.
"""

from fetal_flax.models.aspp import ASPP
from fetal_flax.models.blocks import ConvNorm, DoubleConv, ResidualSEBlock, SqueezeExcite
from fetal_flax.models.decoder import PlainStage, SEStage
from fetal_flax.models.layers import BatchNorm, Conv, SeparableConv, UpConv
from fetal_flax.models.mobilenet_v2 import InvertedResidual, MobileNetV2
from fetal_flax.models.registry import create_model

__all__ = [
    "ASPP",
    "BatchNorm",
    "Conv",
    "ConvNorm",
    "DoubleConv",
    "InvertedResidual",
    "MobileNetV2",
    "PlainStage",
    "ResidualSEBlock",
    "SEStage",
    "SeparableConv",
    "SqueezeExcite",
    "UpConv",
    "create_model",
]
