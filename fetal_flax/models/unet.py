"""A baseline: the U-Net (Ronneberger et al., MICCAI 2015, arXiv:1505.04597)."""

from flax import nnx
from jaxtyping import Array

from fetal_flax.config import ModelConfig
from fetal_flax.models.blocks import DoubleConv, max_pool
from fetal_flax.models.decoder import PlainStage
from fetal_flax.models.interface import EncoderFeatures, Logits, as_input, as_logits
from fetal_flax.models.layers import Conv, FeatureMap


class UNet(nnx.Module):
    """The U-Net with padding and batch norm, and half the paper's width by default.

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
        train: bool | None = None,
        train_encoder: bool | None = None,
        dropout_key: Array | None = None,
        features: EncoderFeatures | None = None,
    ) -> Logits:
        """Segments; the shapes in the comments are for 256×256 images.

        There is no pre-trained encoder, so no features of one, and no dropout here.
        """
        images = as_input(images, self.config, self.divisor)
        enc1 = self.down1(images, train=train)  # 256² × w
        enc2 = self.down2(max_pool(enc1), train=train)  # 128² × 2w
        enc3 = self.down3(max_pool(enc2), train=train)  # 64² × 4w
        enc4 = self.down4(max_pool(enc3), train=train)  # 32² × 8w
        x = self.bottom(max_pool(enc4), train=train)  # 16² × 16w
        x = self.stage4(x, enc4, train=train)  # 32² × 8w
        x = self.stage3(x, enc3, train=train)  # 64² × 4w
        x = self.stage2(x, enc2, train=train)  # 128² × 2w
        x = self.stage1(x, enc1, train=train)  # 256² × w
        return as_logits(self.head(x))  # 256² × 1
