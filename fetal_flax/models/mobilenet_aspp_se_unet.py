"""The proposed network: MobileNetV2 encoder, ASPP bottleneck, SE-residual decoder."""

import dataclasses

from flax import nnx
from jaxtyping import Array

from fetal_flax.config import ModelConfig
from fetal_flax.errors import InputError
from fetal_flax.models.aspp import ASPP, WIDTH_UNIT
from fetal_flax.models.blocks import ConvNorm
from fetal_flax.models.decoder import (
    BOTTLENECK_CHANNELS,
    DECODER_CHANNELS,
    INIT_CHANNELS,
    SEStage,
)
from fetal_flax.models.interface import EncoderFeatures, Logits, as_input, as_logits
from fetal_flax.models.layers import Conv, FeatureMap
from fetal_flax.models.mobilenet_v2 import OUT_CHANNELS, SKIP_CHANNELS, MobileNetV2


@dataclasses.dataclass(frozen=True)
class Variant:
    """What the variants of the proposed network differ in; defaults are what two have in common."""

    aspp_width: int
    """Channels of each ASPP branch."""
    relu_after_sum: bool = False
    """Whether an SE-residual block's second ReLU is behind its sum."""
    se_bias: bool = False
    """Whether the dense layers of squeeze-excite have biases."""
    pool_groups: int = 32
    """Groups of the norm in ASPP's pooled branch."""
    aspp_separable: bool = False
    """Whether the dilated convolutions are separable."""
    init_channels: int = INIT_CHANNELS
    bottleneck_channels: int = BOTTLENECK_CHANNELS
    """Channels behind ASPP's projection."""
    decoder_channels: tuple[int, ...] = DECODER_CHANNELS
    """Outputs of stages 5 to 1."""
    dense_stages: int = len(DECODER_CHANNELS)
    """Stages with dense 3×3 convolutions, counted from the fifth; the others' are separable."""


VARIANTS = {
    "described": Variant(aspp_width=128),
    "published": Variant(aspp_width=512, relu_after_sum=True, se_bias=True),
    "compact": Variant(
        aspp_width=64,
        pool_groups=8,
        aspp_separable=True,
        init_channels=16,
        bottleneck_channels=128,
        decoder_channels=(96, 80, 64, 32, 16),
        dense_stages=3,
    ),
}


class MobileNetASPPSEUNet(nnx.Module):
    """The proposed network (description, sections 2 and 3; docs/architecture.md).

    Args:
        config: Model settings.
        rngs: Source of the `params` stream.

    Raises:
        InputError: `aspp_width` is no multiple of 32.
    """

    divisor = 32

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        variant = VARIANTS[config.variant]
        width = config.aspp_width or variant.aspp_width
        if width % WIDTH_UNIT:
            raise InputError(
                f"setting model.aspp_width must be a multiple of {WIDTH_UNIT}, not {width}"
            )
        self.config = config
        self.init_conv = ConvNorm(config.in_channels, variant.init_channels, 3, rngs=rngs)
        self.encoder = MobileNetV2(config.in_channels, rngs=rngs)
        self.aspp = ASPP(
            OUT_CHANNELS[-1],
            width,
            variant.bottleneck_channels,
            pool_groups=variant.pool_groups,
            separable=variant.aspp_separable,
            dropout=config.dropout,
            rngs=rngs,
        )
        outputs = variant.decoder_channels
        inputs = (variant.bottleneck_channels, *outputs[:-1])
        skips = (*SKIP_CHANNELS, variant.init_channels)
        self.stage5, self.stage4, self.stage3, self.stage2, self.stage1 = (
            SEStage(
                *channels,
                relu_after_sum=variant.relu_after_sum,
                se_bias=variant.se_bias,
                separable=index >= variant.dense_stages,
                rngs=rngs,
            )
            for index, channels in enumerate(zip(inputs, skips, outputs, strict=True))
        )
        self.head: Conv | None = Conv(outputs[-1], 1, 1, bias=True, rngs=rngs)

    def __call__(
        self,
        images: FeatureMap,
        *,
        train: bool | None = None,
        train_encoder: bool | None = None,
        dropout_key: Array | None = None,
        features: EncoderFeatures | None = None,
    ) -> Logits:
        """Segments; the shapes in the comments are for 256×256 images and all but `compact`.

        `features` are what the encoder has made of the images before.
        """
        images = as_input(images, self.config, self.divisor)
        enc0 = nnx.relu(self.init_conv(images, train=train))  # 256² × 32
        # 128² × 16, 64² × 24, 32² × 32, 16² × 96, 8² × 1280
        enc1, enc2, enc3, enc4, enc5 = features or self.encoder(images, train=train_encoder)
        x = self.aspp(enc5, train=train, dropout_key=dropout_key)  # 8² × 512
        x = self.stage5(x, enc4, train=train)  # 16² × 256
        x = self.stage4(x, enc3, train=train)  # 32² × 128
        x = self.stage3(x, enc2, train=train)  # 64² × 64
        x = self.stage2(x, enc1, train=train)  # 128² × 32
        x = self.stage1(x, enc0, train=train)  # 256² × 32
        return as_logits(x if self.head is None else self.head(x))  # 256² × 1
