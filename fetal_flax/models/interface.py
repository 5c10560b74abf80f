"""What every network takes and returns."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fetal_flax.config import ModelConfig
from fetal_flax.errors import InputError
from fetal_flax.models.layers import FeatureMap

Logits = Float[Array, "batch height width 1"]
EncoderFeatures = tuple[FeatureMap, ...]
"""An encoder's, from stride 2 to stride 32."""


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
