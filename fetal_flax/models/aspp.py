"""Atrous spatial pyramid pooling (Chen et al., arXiv:1706.05587; description, section 2)."""

import jax
from flax import nnx
from jaxtyping import Array

from fetal_flax.errors import InputError
from fetal_flax.models.blocks import ConvNorm
from fetal_flax.models.layers import Conv, FeatureMap, broadcast_to_map

DILATIONS = (6, 12, 18)
WIDTH_UNIT = 32
"""What every branch's width is a multiple of."""


class ASPP(nnx.Module):
    """A 1×1, three dilated 3×3 and a pooled branch, concatenated and projected.

    From (batch, height, width, inputs) to (batch, height, width, outputs).

    Args:
        inputs: Input channels.
        width: Channels of each branch, a multiple of 32.
        outputs: Channels after the projection.
        pool_groups: Groups of the pooled branch's norm. On its 1×1 map a group is a few channels of
            one pixel, and one of two channels would be normalised to ±1 whatever the image.
        separable: Whether the dilated convolutions are separable.
        dropout: Rate behind the projection.
        rngs: Source of the `params` stream. A call that drops out takes its own `dropout_key`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> aspp = ASPP(320, 64, 128, dropout=0.5, rngs=nnx.Rngs(0))
        >>> aspp(jnp.ones((2, 8, 8, 320))).shape
        (2, 8, 8, 128)
        >>> aspp.train()
        >>> aspp(jnp.ones((2, 8, 8, 320)), dropout_key=jax.random.key(0)).shape
        (2, 8, 8, 128)
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        outputs: int,
        *,
        pool_groups: int = 32,
        separable: bool = False,
        dropout: float = 0.5,
        rngs: nnx.Rngs,
    ):
        self.point = ConvNorm(inputs, width, 1, rngs=rngs)
        self.atrous = nnx.List(
            [
                ConvNorm(inputs, width, 3, dilation=rate, separable=separable, rngs=rngs)
                for rate in DILATIONS
            ]
        )
        self.pool_conv = Conv(inputs, width, 1, rngs=rngs)
        # Flax's default epsilon is 1e-6, torch's 1e-5; its fast variance loses digits.
        self.pool_norm = nnx.GroupNorm(
            width, num_groups=pool_groups, epsilon=1e-5, use_fast_variance=False, rngs=rngs
        )
        self.project = ConvNorm((2 + len(DILATIONS)) * width, outputs, 1, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, deterministic=True)

    def __call__(
        self, x: FeatureMap, *, train: bool | None = None, dropout_key: Array | None = None
    ) -> FeatureMap:
        branches = [nnx.relu(branch(x, train=train)) for branch in (self.point, *self.atrous)]
        pooled = self.pool_conv(x.mean((1, 2), keepdims=True))
        # Flax's own arithmetic mixes dtypes; ours stays strict.
        with jax.numpy_dtype_promotion("standard"):
            pooled = nnx.relu(self.pool_norm(pooled)).astype(x.dtype)
        # Interpolating a 1×1 map is a broadcast.
        branches.append(broadcast_to_map(pooled, (*x.shape[:3], pooled.shape[-1])))
        y = nnx.relu(self.project(jax.lax.concatenate(branches, 3), train=train))
        return self._drop_out(y, train, dropout_key)

    def _drop_out(self, y: FeatureMap, train: bool | None, key: Array | None) -> FeatureMap:
        deterministic = self.dropout.deterministic if train is None else not train
        if key is None and self.dropout.rate > 0 and not deterministic:
            raise InputError("dropout in training needs a random key: give the call a dropout_key")
        rngs = None if key is None else nnx.Rngs(dropout=key)
        return self.dropout(y, deterministic=deterministic, rngs=rngs)
