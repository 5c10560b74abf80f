"""A baseline: the proposed network's encoder with a plain U-Net decoder."""

from flax import nnx
from jaxtyping import Array

from fetal_flax.config import ModelConfig
from fetal_flax.models.blocks import ConvNorm, DoubleConv
from fetal_flax.models.decoder import (
    BOTTLENECK_CHANNELS,
    DECODER_CHANNELS,
    INIT_CHANNELS,
    PlainStage,
)
from fetal_flax.models.interface import EncoderFeatures, Logits, as_input, as_logits
from fetal_flax.models.layers import Conv, FeatureMap
from fetal_flax.models.mobilenet_v2 import OUT_CHANNELS, SKIP_CHANNELS, MobileNetV2


class MobileNetUNet(nnx.Module):
    """MobileNetV2 encoder, plain double convolutions in bottleneck and decoder.

    Args:
        config: Model settings.
        rngs: Source of the `params` stream.
    """

    divisor = 32

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.init_conv = ConvNorm(config.in_channels, INIT_CHANNELS, 3, rngs=rngs)
        self.encoder = MobileNetV2(config.in_channels, rngs=rngs)
        self.bottleneck = DoubleConv(OUT_CHANNELS[-1], BOTTLENECK_CHANNELS, rngs=rngs)
        inputs = (BOTTLENECK_CHANNELS, *DECODER_CHANNELS[:-1])
        skips = (*SKIP_CHANNELS, INIT_CHANNELS)
        self.stage5, self.stage4, self.stage3, self.stage2, self.stage1 = (
            PlainStage(*channels, skip_first=False, rngs=rngs)
            for channels in zip(inputs, skips, DECODER_CHANNELS, strict=True)
        )
        self.head = Conv(DECODER_CHANNELS[-1], 1, 1, bias=True, rngs=rngs)

    def __call__(
        self,
        images: FeatureMap,
        *,
        train: bool | None = None,
        train_encoder: bool | None = None,
        dropout_key: Array | None = None,
        features: EncoderFeatures | None = None,
    ) -> Logits:
        """Segments; the shapes in the comments are for 256×256 images.

        The network has no dropout and leaves the key unused.

        `features` are what the encoder has made of the images before.
        """
        images = as_input(images, self.config, self.divisor)
        enc0 = nnx.relu(self.init_conv(images, train=train))  # 256² × 32
        # 128² × 16, 64² × 24, 32² × 32, 16² × 96, 8² × 1280
        enc1, enc2, enc3, enc4, enc5 = features or self.encoder(images, train=train_encoder)
        x = self.bottleneck(enc5, train=train)  # 8² × 512
        x = self.stage5(x, enc4, train=train)  # 16² × 256
        x = self.stage4(x, enc3, train=train)  # 32² × 128
        x = self.stage3(x, enc2, train=train)  # 64² × 64
        x = self.stage2(x, enc1, train=train)  # 128² × 32
        x = self.stage1(x, enc0, train=train)  # 256² × 32
        return as_logits(self.head(x))  # 256² × 1
