"""MobileNetV2's feature extractor (Sandler et al., CVPR 2018), as torchvision numbers it."""

from flax import nnx

from fetal_flax.models.blocks import ConvNorm
from fetal_flax.models.init import he_normal_fan_out
from fetal_flax.models.layers import FeatureMap

# Expansion, output channels, repeats, stride of the first: table 2 of the paper.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS = 32
OUT_INDICES = (1, 3, 6, 13, 18)  # blocks whose output the decoder uses: strides 2, 4, 8, 16, 32
OUT_CHANNELS = (16, 24, 32, 96, 1280)


class InvertedResidual(nnx.Module):
    """1×1 expansion, 3×3 depthwise, linear 1×1 projection; a shortcut where shapes agree.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        stride: Of the depthwise convolution.
        expansion: Factor on the inputs; 1 leaves the expansion out.
        rngs: Source of the `params` stream.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, *, rngs: nnx.Rngs):
        hidden = inputs * expansion
        self.expand = None if expansion == 1 else _conv_norm(inputs, hidden, 1, rngs)
        self.depthwise = _conv_norm(hidden, hidden, 3, rngs, stride=stride, depthwise=True)
        self.project = _conv_norm(hidden, outputs, 1, rngs)
        self.residual = stride == 1 and inputs == outputs

    def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
        y = x if self.expand is None else nnx.relu6(self.expand(x, train=train))
        y = nnx.relu6(self.depthwise(y, train=train))
        y = self.project(y, train=train)
        return x + y if self.residual else y


class MobileNetV2(nnx.Module):
    """Stem, 17 inverted residuals and the last 1×1 convolution: blocks 0 to 18.

    Args:
        channels: Image channels.
        rngs: Source of the `params` stream.

    Example:
        >>> encoder = ff.models.MobileNetV2(1, rngs=nnx.Rngs(0))
        >>> encode = nnx.jit(lambda encoder, images: encoder(images, train=False))
        >>> for features in encode(encoder, jnp.ones((1, 64, 64, 1))):
        ...     print(features.shape)
        (1, 32, 32, 16)
        (1, 16, 16, 24)
        (1, 8, 8, 32)
        (1, 4, 4, 96)
        (1, 2, 2, 1280)
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        blocks: list[nnx.Module] = [_conv_norm(channels, STEM_CHANNELS, 3, rngs, stride=2)]
        inputs = STEM_CHANNELS
        for expansion, outputs, repeats, first_stride in STAGES:
            for repeat in range(repeats):
                stride = first_stride if repeat == 0 else 1
                blocks.append(InvertedResidual(inputs, outputs, stride, expansion, rngs=rngs))
                inputs = outputs
        blocks.append(_conv_norm(inputs, OUT_CHANNELS[-1], 1, rngs))
        self.blocks = nnx.List(blocks)

    def __call__(self, x: FeatureMap, *, train: bool) -> list[FeatureMap]:
        """Returns the maps after `OUT_INDICES`, from stride 2 to stride 32."""
        taps = []
        for index, block in enumerate(self.blocks):
            x = block(x, train=train)
            if isinstance(block, ConvNorm):
                x = nnx.relu6(x)
            if index in OUT_INDICES:
                taps.append(x)
        return taps


def _conv_norm(
    inputs: int,
    outputs: int,
    size: int,
    rngs: nnx.Rngs,
    *,
    stride: int = 1,
    depthwise: bool = False,
) -> ConvNorm:
    """A block initialised as torchvision does; it matters only without a pre-trained file."""
    # torchvision's fan-out counts all channels, also where each filter sees one.
    init = he_normal_fan_out(size * size * outputs)
    return ConvNorm(
        inputs, outputs, size, stride=stride, depthwise=depthwise, kernel_init=init, rngs=rngs
    )
