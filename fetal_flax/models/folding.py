"""A network for evaluation alone: the same function in fewer operations.

Batch norms become part of their convolutions, the head part of the last block. On a CPU, the
transposed convolutions become part of the convolutions behind them, unless these are separable: a
composed kernel would double their operations. Elsewhere larger kernels with an odd number of
channels cost more than the operations that they save.

At 256×256, what an image's maps take at once is then less than 32 MB, which is what glibc keeps
from one call to the next: more, the system would have to find and clear anew for each.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from fetal_flax._util.backend import target_backend
from fetal_flax.models.blocks import ConvNorm, ResidualSEBlock, SqueezeExcite
from fetal_flax.models.convolution import (
    FeatureMap,
    Kernel,
    compose_up_3x3,
    plain_convolution,
    up_convolution_3x3,
)
from fetal_flax.models.decoder import PlainStage, SEStage
from fetal_flax.models.layers import Conv, SeparableConv, UpConv, add_bias, per_channel
from fetal_flax.models.mobilenet_aspp_se_unet import MobileNetASPPSEUNet
from fetal_flax.models.registry import Network


def fold(network: Network) -> None:
    """Turns the network into one for evaluation, by its running statistics."""
    fold_norms(network)
    if isinstance(network, MobileNetASPPSEUNet) and not network.stage1.block.relu_after_sum:
        fold_head(network)
    if target_backend() == "cpu":
        for part in _modules(network, SEStage, PlainStage):
            if isinstance(part.block.first.conv, Conv):
                fold_up(part)


def fold_norms(module: nnx.Module) -> None:
    """Makes every batch norm part of its convolution."""
    for part in _modules(module, ConvNorm):
        gain, shift = part.norm.running_affine()
        last = part.conv.pointwise if isinstance(part.conv, SeparableConv) else part.conv
        last.kernel.set_value(last.kernel[...] * per_channel(gain))
        last.bias = nnx.data(nnx.Param(shift))
        part.norm = None


def fold_head(network: MobileNetASPPSEUNet) -> None:
    """Makes the head part of the two summands of the last block, which are linear up to it."""
    block, head = network.stage1.block, network.head
    assert head is not None and head.bias is not None, "folded before"
    assert block.shortcut is not None, "a concatenation has more channels than the stage"
    shortcut, kernel = block.shortcut.conv, head.kernel[...][0, 0]
    assert isinstance(shortcut, Conv) and shortcut.bias is not None, "batch norms are folded first"
    shortcut.kernel.set_value(shortcut.kernel[...] @ kernel)
    shortcut.bias.set_value(shortcut.bias[...] @ kernel + head.bias[...])
    block.se = SqueezeExciteWithHead(block.se, kernel)
    network.head = None


class SqueezeExciteWithHead(SqueezeExcite):
    """Channel attention and the 1×1 convolution behind it, as one weighted sum over channels.

    Args:
        se: The channel attention.
        kernel: The convolution's.
    """

    def __init__(self, se: SqueezeExcite, kernel: Array):
        self.squeeze, self.excite = se.squeeze, se.excite
        self.kernel = nnx.Param(kernel)

    def __call__(self, x: FeatureMap) -> FeatureMap:
        batch, height, width, channels = x.shape
        kernels = self.weights(x)[:, :, None] * self.kernel[...].astype(x.dtype)[None]
        return (x.reshape(batch, -1, channels) @ kernels).reshape(batch, height, width, -1)


def fold_up(stage: SEStage | PlainStage) -> None:
    """Makes a stage's transposed convolution part of the convolutions that read it."""
    skip_first = isinstance(stage, PlainStage) and stage.skip_first
    block, up = stage.block, stage.up
    assert up is not None, "folded before"
    readers = [block.first]
    if isinstance(block, ResidualSEBlock):
        assert block.shortcut is not None, "a concatenation has more channels than the stage"
        readers.append(block.shortcut)
    for reader in readers:
        assert isinstance(reader.conv, Conv), "separable convolutions read the upsampled map"
        reader.conv = UpsampleFusedConv(up, reader.conv, skip_first=skip_first)
    stage.up = None


class UpsampleFusedConv(Conv):
    """A convolution of an upsampled map and a skip that takes the map before it is upsampled.

    Args:
        up: The transposed convolution.
        conv: The convolution of both maps, 1×1 or 3×3.
        skip_first: Whether the skip comes first.
    """

    def __init__(self, up: UpConv, conv: Conv, *, skip_first: bool):
        kernel, between = conv.kernel[...], up.kernel.shape[-1]
        if skip_first:
            of_skip, of_up = jnp.split(kernel, [kernel.shape[2] - between], axis=2)
        else:
            of_up, of_skip = jnp.split(kernel, [between], axis=2)
        compose = UpConv1x1 if len(kernel) == 1 else UpConv3x3
        self.up = compose(up.kernel[...], up.bias[...], of_up)
        self.kernel = nnx.Param(of_skip)
        self.bias = conv.bias
        self.skip_first = skip_first

    def __call__(self, *maps: FeatureMap) -> FeatureMap:
        skip, x = maps if self.skip_first else maps[::-1]
        y = self.up(x) + plain_convolution(skip, self.kernel[...].astype(skip.dtype))
        return y if self.bias is None else add_bias(y, self.bias[...])


class UpConv1x1(UpConv):
    """A transposed convolution and the 1×1 convolution behind it."""

    def __init__(self, kernel: Array, bias: Array, behind: Kernel):
        self.kernel = nnx.Param(kernel @ behind[0, 0])
        self.bias = nnx.Param(bias @ behind[0, 0])


class UpConv3x3(nnx.Module):
    """A transposed convolution and the 3×3 convolution behind it."""

    def __init__(self, kernel: Array, bias: Array, behind: Kernel):
        self.kernel = nnx.Param(compose_up_3x3(kernel, bias, behind))

    def __call__(self, x: FeatureMap) -> FeatureMap:
        return up_convolution_3x3(x, self.kernel[...].astype(x.dtype))


def _modules(parent: nnx.Module, *kinds: type) -> list:
    """Returns the modules of these kinds, before any of them changes."""
    return [part for _, part in nnx.iter_modules(parent) if isinstance(part, kinds)]
