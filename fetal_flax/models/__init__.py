"""The networks: pure Flax NNX code that knows nothing of data or training.

The blocks can be taken into any other Flax model.
"""

from fetal_flax.models.aspp import ASPP
from fetal_flax.models.blocks import ConvNorm, ResidualSEBlock, SqueezeExcite
from fetal_flax.models.layers import Conv
from fetal_flax.models.mobilenet_v2 import MobileNetV2

__all__ = ["ASPP", "Conv", "ConvNorm", "MobileNetV2", "ResidualSEBlock", "SqueezeExcite"]
