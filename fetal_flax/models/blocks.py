"""What the networks are built of: convolution blocks and squeeze-excite."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fetal_flax._util.backend import target_backend
from fetal_flax.models.init import torch_uniform
from fetal_flax.models.layers import BatchNorm, Conv, FeatureMap, SeparableConv, broadcast_to_map


class ConvNorm(nnx.Module):
    """Convolution without bias, then batch norm; the caller applies the activation.

    From (batch, height, width, inputs) to (batch, height / stride, width / stride, outputs), sides
    rounded up. Batch norm is torch's (`layers.BatchNorm`; Ioffe and Szegedy, ICML 2015).

    Args:
        inputs: Input channels.
        outputs: Output channels.
        size: Kernel height and width.
        separable: Whether the convolution is a `SeparableConv`.
        rngs: Source of the `params` stream.
        conv: Further arguments of `Conv`: stride, dilation, depthwise, kernel_init; of
            `SeparableConv`: dilation.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> block = ConvNorm(3, 8, 3, stride=2, rngs=nnx.Rngs(0))
        >>> block(jnp.ones((1, 32, 48, 3))).shape
        (1, 16, 24, 8)
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        separable: bool = False,
        rngs: nnx.Rngs,
        **conv: Any,
    ):
        kind = SeparableConv if separable else Conv
        self.conv: Conv | SeparableConv = kind(inputs, outputs, size, rngs=rngs, **conv)
        self.norm: BatchNorm | None = BatchNorm(outputs)

    def __call__(self, *maps: FeatureMap, train: bool | None = None) -> FeatureMap:
        y = self.conv(*maps)
        if self.norm is None:
            assert not train, "a folded batch norm has no batch statistics"
            return y
        return self.norm(y, train=train)


class DoubleConv(nnx.Module):
    """(3×3 convolution, batch norm, ReLU) twice (Ronneberger et al. 2015, with batch norm).

    From (batch, height, width, inputs) to (batch, height, width, outputs). Several maps are
    concatenated first.

    Args:
        inputs: Input channels, of all maps together.
        outputs: Output channels.
        rngs: Source of the `params` stream.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> DoubleConv(1, 8, rngs=nnx.Rngs(0))(jnp.ones((1, 32, 48, 1))).shape
        (1, 32, 48, 8)
    """

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.first = ConvNorm(inputs, outputs, 3, rngs=rngs)
        self.second = ConvNorm(outputs, outputs, 3, rngs=rngs)

    def __call__(self, *maps: FeatureMap, train: bool | None = None) -> FeatureMap:
        x = nnx.relu(self.first(*maps, train=train))
        return nnx.relu(self.second(x, train=train))


class SqueezeExcite(nnx.Module):
    """Channel attention (Hu et al., CVPR 2018, section 3; description, section 3.2).

    From (batch, height, width, channels) to the same shape.

    Args:
        channels: Channels of the map.
        bias: Whether the two dense layers have a bias (published code) or not (description).
        reduction: How many channels share one hidden unit; the paper's r.
        rngs: Source of the `params` stream.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> attention = SqueezeExcite(64, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((2, 8, 8, 64))
        >>> attention(x).shape, attention.weights(x).shape
        ((2, 8, 8, 64), (2, 64))
    """

    def __init__(self, channels: int, *, bias: bool = False, reduction: int = 16, rngs: nnx.Rngs):
        hidden = max(channels // reduction, 1)
        self.squeeze = _dense(channels, hidden, bias, rngs)
        self.excite = _dense(hidden, channels, bias, rngs)

    def weights(self, x: FeatureMap) -> Float[Array, "batch channels"]:
        """Returns the factors of the map's channels, in its dtype."""
        # They are few: until then they stay in at least float32 whatever the map's dtype.
        pooled = x.mean((1, 2), dtype=np.promote_types(x.dtype, np.float32))
        hidden = nnx.relu(_apply_dense(self.squeeze, pooled))
        return nnx.sigmoid(_apply_dense(self.excite, hidden)).astype(x.dtype)

    def __call__(self, x: FeatureMap) -> FeatureMap:
        return x * broadcast_to_map(self.weights(x)[:, None, None, :], x.shape)


class ResidualSEBlock(nnx.Module):
    """Two convolutions, squeeze-excite and a shortcut (description, section 3.3).

    The description puts the second ReLU before the squeeze-excite and none behind the sum; the
    published code puts it behind the sum. From (batch, height, width, inputs) to (batch, height,
    width, outputs); several maps are concatenated first.

    Args:
        inputs: Input channels, of all maps together.
        outputs: Output channels; where they equal the inputs, there is one map and the shortcut
            is that map itself.
        relu_after_sum: The published order instead of the described one.
        se_bias: Whether the squeeze-excite has biases.
        separable: Whether the two convolutions are separable.
        rngs: Source of the `params` stream.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> block = ResidualSEBlock(48, 32, rngs=nnx.Rngs(0))
        >>> upsampled, skip = jnp.ones((1, 16, 16, 32)), jnp.ones((1, 16, 16, 16))
        >>> block(upsampled, skip).shape
        (1, 16, 16, 32)
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        relu_after_sum: bool = False,
        se_bias: bool = False,
        separable: bool = False,
        rngs: nnx.Rngs,
    ):
        self.first = ConvNorm(inputs, outputs, 3, separable=separable, rngs=rngs)
        self.second = ConvNorm(outputs, outputs, 3, separable=separable, rngs=rngs)
        self.se = SqueezeExcite(outputs, bias=se_bias, rngs=rngs)
        self.shortcut = None if inputs == outputs else ConvNorm(inputs, outputs, 1, rngs=rngs)
        self.relu_after_sum = relu_after_sum

    def __call__(self, *maps: FeatureMap, train: bool | None = None) -> FeatureMap:
        y = nnx.relu(self.first(*maps, train=train))
        y = self.second(y, train=train)
        if not self.relu_after_sum:
            y = nnx.relu(y)
        y = self.se(y)
        y = y + (maps[0] if self.shortcut is None else self.shortcut(*maps, train=train))
        return nnx.relu(y) if self.relu_after_sum else y


def max_pool(x: FeatureMap) -> FeatureMap:
    """2×2 maximum with stride 2; height and width are even.

    By comparison and not by `max`, whose gradient looks for elements that equal the maximum: XLA
    may compute the map again for it, rounded otherwise, find none and divide by zero.
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width // 2, 2, channels)
    x = jnp.where(x[..., 0, :] >= x[..., 1, :], x[..., 0, :], x[..., 1, :])
    x = x.reshape(batch, height // 2, 2, width // 2, channels)
    return jnp.where(x[:, :, 0] >= x[:, :, 1], x[:, :, 0], x[:, :, 1])


def _dense(inputs: int, outputs: int, bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
    init = torch_uniform(fan_in=inputs)
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=init, bias_init=init, rngs=rngs)


def _apply_dense(
    layer: nnx.Linear, x: Float[Array, "batch inputs"]
) -> Float[Array, "batch outputs"]:
    """Applies a layer that is so small that on a GPU its kernels' number is what it costs."""
    if target_backend() == "cpu":
        return layer(x)
    # Not a matrix product: a library's would be a kernel apart from the activations around it.
    y = (x[:, :, None] * layer.kernel[...].astype(x.dtype)[None]).sum(1)
    return y if layer.bias is None else y + layer.bias[...].astype(x.dtype)[None]
