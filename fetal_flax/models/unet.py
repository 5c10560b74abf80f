"""The three networks: the proposed one and its two baselines.

Each takes images in [0, 1], (batch, height, width, channels), and returns raw logits in float32,
(batch, height, width, 1). `train=True` normalises with batch statistics, updates the running
ones and drops out; `train_encoder=True` does the same for the encoder's batch norms, which is
what a trainable encoder wants and a frozen one does not. No parameter is frozen here: that is
the optimizer's business (training/optimizer.py).
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fetal_flax.config import ModelConfig
from fetal_flax.errors import InputError
from fetal_flax.models.aspp import ASPP, WIDTH_UNIT
from fetal_flax.models.blocks import (
    ConvNorm,
    DoubleConv,
    ResidualSEBlock,
    SqueezeExcite,
    max_pool,
)
from fetal_flax.models.layers import Conv, FeatureMap, UpConv
from fetal_flax.models.mobilenet_v2 import OUT_CHANNELS, MobileNetV2

Logits = Float[Array, "batch height width 1"]
EncoderFeatures = tuple[FeatureMap, ...]
"""An encoder's, from stride 2 to stride 32."""

INIT_CHANNELS = 32
BOTTLENECK_CHANNELS = 512
DECODER_CHANNELS = (256, 128, 64, 32, 32)  # stages 5 to 1
SKIP_CHANNELS = OUT_CHANNELS[3::-1]  # enc4 to enc1; enc0 is as wide as `init_conv`


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


class SEStage(nnx.Module):
    """One decoder stage: double the size, filter the skip, concatenate, SE-residual block.

    Args:
        inputs: Channels of the map from below.
        skip: Channels of the skip.
        outputs: Output channels.
        variant: Whose block it is.
        separable: Whether the block's convolutions are separable.
        rngs: Source of the `params` stream.
    """

    def __init__(
        self,
        inputs: int,
        skip: int,
        outputs: int,
        variant: Variant,
        *,
        separable: bool = False,
        rngs: nnx.Rngs,
    ):
        self.up: UpConv | None = UpConv(inputs, outputs, rngs=rngs)
        self.skip_se = SqueezeExcite(skip, bias=variant.se_bias, rngs=rngs)
        self.block = ResidualSEBlock(
            outputs + skip,
            outputs,
            relu_after_sum=variant.relu_after_sum,
            se_bias=variant.se_bias,
            separable=separable,
            rngs=rngs,
        )

    def __call__(self, x: FeatureMap, skip: FeatureMap, *, train: bool) -> FeatureMap:
        x = x if self.up is None else self.up(x)
        return self.block(x, self.skip_se(skip), train=train)


class PlainStage(nnx.Module):
    """One decoder stage of the baselines: double the size, concatenate, double convolution.

    Args:
        inputs: Channels of the map from below.
        skip: Channels of the skip.
        outputs: Output channels.
        skip_first: Whether the skip comes first in the concatenation.
        rngs: Source of the `params` stream.
    """

    def __init__(self, inputs: int, skip: int, outputs: int, *, skip_first: bool, rngs: nnx.Rngs):
        self.up: UpConv | None = UpConv(inputs, outputs, rngs=rngs)
        self.block = DoubleConv(outputs + skip, outputs, rngs=rngs)
        self.skip_first = skip_first

    def __call__(self, x: FeatureMap, skip: FeatureMap, *, train: bool) -> FeatureMap:
        x = x if self.up is None else self.up(x)
        maps = (skip, x) if self.skip_first else (x, skip)
        return self.block(*maps, train=train)


class MobileNetASPPSEUNet(nnx.Module):
    """The proposed network: MobileNetV2 encoder, ASPP bottleneck, SE-residual decoder.

    Args:
        config: Model settings.
        rngs: Source of the `params` stream.
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
            SEStage(*channels, variant, separable=index >= variant.dense_stages, rngs=rngs)
            for index, channels in enumerate(zip(inputs, skips, outputs, strict=True))
        )
        self.head: Conv | None = Conv(outputs[-1], 1, 1, bias=True, rngs=rngs)

    def __call__(
        self,
        images: FeatureMap,
        *,
        train: bool = False,
        train_encoder: bool = False,
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


class MobileNetUNet(nnx.Module):
    """Baseline: the same encoder, plain double convolutions in bottleneck and decoder.

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
        train: bool = False,
        train_encoder: bool = False,
        dropout_key: Array | None = None,
        features: EncoderFeatures | None = None,
    ) -> Logits:
        """Segments; the network has no dropout and leaves the key unused.

        `features` are what the encoder has made of the images before.
        """
        images = as_input(images, self.config, self.divisor)
        enc0 = nnx.relu(self.init_conv(images, train=train))
        enc1, enc2, enc3, enc4, enc5 = features or self.encoder(images, train=train_encoder)
        x = self.bottleneck(enc5, train=train)
        x = self.stage5(x, enc4, train=train)
        x = self.stage4(x, enc3, train=train)
        x = self.stage3(x, enc2, train=train)
        x = self.stage2(x, enc1, train=train)
        x = self.stage1(x, enc0, train=train)
        return as_logits(self.head(x))


class UNet(nnx.Module):
    """Baseline: the U-Net of Ronneberger et al. (2015) with padding and batch norm.

    Args:
        config: Model settings; `base_width` w gives w, 2w, 4w, 8w, 16w channels.
        rngs: Source of the `params` stream.
    """

    divisor = 16

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        w1, w2, w3, w4, w5 = (config.base_width * 2**level for level in range(5))
        self.down1 = DoubleConv(config.in_channels, w1, rngs=rngs)
        self.down2 = DoubleConv(w1, w2, rngs=rngs)
        self.down3 = DoubleConv(w2, w3, rngs=rngs)
        self.down4 = DoubleConv(w3, w4, rngs=rngs)
        self.bottom = DoubleConv(w4, w5, rngs=rngs)
        self.stage4 = PlainStage(w5, w4, w4, skip_first=True, rngs=rngs)
        self.stage3 = PlainStage(w4, w3, w3, skip_first=True, rngs=rngs)
        self.stage2 = PlainStage(w3, w2, w2, skip_first=True, rngs=rngs)
        self.stage1 = PlainStage(w2, w1, w1, skip_first=True, rngs=rngs)
        self.head = Conv(w1, 1, 1, bias=True, rngs=rngs)

    def __call__(
        self,
        images: FeatureMap,
        *,
        train: bool = False,
        train_encoder: bool = False,
        dropout_key: Array | None = None,
        features: EncoderFeatures | None = None,
    ) -> Logits:
        """Segments; there is no pre-trained encoder, so no maps of one, and no dropout here."""
        images = as_input(images, self.config, self.divisor)
        enc1 = self.down1(images, train=train)  # 256² × w
        enc2 = self.down2(max_pool(enc1), train=train)  # 128² × 2w
        enc3 = self.down3(max_pool(enc2), train=train)  # 64² × 4w
        enc4 = self.down4(max_pool(enc3), train=train)  # 32² × 8w
        x = self.bottom(max_pool(enc4), train=train)  # 16² × 16w
        x = self.stage4(x, enc4, train=train)
        x = self.stage3(x, enc3, train=train)
        x = self.stage2(x, enc2, train=train)
        x = self.stage1(x, enc1, train=train)
        return as_logits(self.head(x))


Network = MobileNetASPPSEUNet | MobileNetUNet | UNet

NETWORKS: dict[str, type[Network]] = {
    "mobilenet_aspp_se_unet": MobileNetASPPSEUNet,
    "mobilenet_unet": MobileNetUNet,
    "unet": UNet,
}


def create_network(config: ModelConfig, *, rngs: nnx.Rngs) -> Network:
    """Returns the network that `config` names, freshly initialised."""
    return NETWORKS[config.name](config, rngs=rngs)


def as_input(images: FeatureMap, config: ModelConfig, divisor: int) -> FeatureMap:
    """Returns the images in the dtype that the network computes in.

    That is bfloat16, or else the images' own: float32, and float64 where parity is checked.

    Raises:
        InputError: The images' shape doesn't fit the network.
    """
    batch, height, width, channels = images.shape if images.ndim == 4 else (0, 0, 0, 0)
    sides_fit = height % divisor == 0 and width % divisor == 0
    if 0 in (batch, height, width) or not sides_fit or channels != config.in_channels:
        raise InputError(
            f"images of shape {images.shape} don't fit {config.name}, which takes (batch, height, "
            f"width, {config.in_channels}) with height and width multiples of {divisor}"
        )
    return images.astype(jnp.bfloat16) if config.dtype == "bfloat16" else images


def as_logits(x: FeatureMap) -> Logits:
    """Returns the head's map in at least float32, so that loss and metrics are."""
    return x.astype(np.promote_types(x.dtype, np.float32))
