"""The decoders' stages, and how wide the two networks on a MobileNetV2 encoder make them."""

from flax import nnx

from fetal_flax.models.blocks import DoubleConv, ResidualSEBlock, SqueezeExcite
from fetal_flax.models.layers import FeatureMap, UpConv

INIT_CHANNELS = 32
"""Channels of the map at full resolution."""
BOTTLENECK_CHANNELS = 512
DECODER_CHANNELS = (256, 128, 64, 32, 32)
"""Outputs of stages 5 to 1."""


class SEStage(nnx.Module):
    """Double the size, filter the skip, concatenate, SE-residual block (description, section 3).

    From (batch, height, width, inputs) and a skip of (batch, 2·height, 2·width, skip) to
    (batch, 2·height, 2·width, outputs).

    Args:
        inputs: Channels of the map from below.
        skip: Channels of the skip.
        outputs: Output channels.
        relu_after_sum: Whether the block has the published order, not the described one.
        se_bias: Whether both squeeze-excites have biases.
        separable: Whether the block's convolutions are separable.
        rngs: Source of the `params` stream.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> stage = SEStage(512, 96, 256, rngs=nnx.Rngs(0))
        >>> stage(jnp.ones((1, 8, 8, 512)), jnp.ones((1, 16, 16, 96))).shape
        (1, 16, 16, 256)
    """

    def __init__(
        self,
        inputs: int,
        skip: int,
        outputs: int,
        *,
        relu_after_sum: bool = False,
        se_bias: bool = False,
        separable: bool = False,
        rngs: nnx.Rngs,
    ):
        self.up: UpConv | None = UpConv(inputs, outputs, rngs=rngs)
        self.skip_se = SqueezeExcite(skip, bias=se_bias, rngs=rngs)
        self.block = ResidualSEBlock(
            outputs + skip,
            outputs,
            relu_after_sum=relu_after_sum,
            se_bias=se_bias,
            separable=separable,
            rngs=rngs,
        )

    def __call__(self, x: FeatureMap, skip: FeatureMap, *, train: bool | None = None) -> FeatureMap:
        x = x if self.up is None else self.up(x)
        return self.block(x, self.skip_se(skip), train=train)


class PlainStage(nnx.Module):
    """Double the size, concatenate, double convolution (Ronneberger et al. 2015).

    From (batch, height, width, inputs) and a skip of (batch, 2·height, 2·width, skip) to
    (batch, 2·height, 2·width, outputs).

    Args:
        inputs: Channels of the map from below.
        skip: Channels of the skip.
        outputs: Output channels.
        skip_first: Whether the skip comes first in the concatenation.
        rngs: Source of the `params` stream.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> stage = PlainStage(64, 32, 32, skip_first=True, rngs=nnx.Rngs(0))
        >>> stage(jnp.ones((1, 8, 8, 64)), jnp.ones((1, 16, 16, 32))).shape
        (1, 16, 16, 32)
    """

    def __init__(self, inputs: int, skip: int, outputs: int, *, skip_first: bool, rngs: nnx.Rngs):
        self.up: UpConv | None = UpConv(inputs, outputs, rngs=rngs)
        self.block = DoubleConv(outputs + skip, outputs, rngs=rngs)
        self.skip_first = skip_first

    def __call__(self, x: FeatureMap, skip: FeatureMap, *, train: bool | None = None) -> FeatureMap:
        x = x if self.up is None else self.up(x)
        maps = (skip, x) if self.skip_first else (x, skip)
        return self.block(*maps, train=train)
