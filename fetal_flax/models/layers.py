"""Layers with PyTorch's meaning where Flax's own differ.

All maps are NHWC. Parameters are float32; a layer computes in the dtype of the map it is given.
Layers and blocks that train otherwise than they evaluate take `train` in the call; None is what
`train()` or `eval()` of the module have set last, and a new module begins in evaluation.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fetal_flax._util.backend import target_backend
from fetal_flax.errors import InputError
from fetal_flax.models.convolution import FeatureMap, convolution, depth_to_space
from fetal_flax.models.init import torch_uniform

Vector = Float[Array, " channels"]


def per_channel(vector: Vector) -> Float[Array, "1 1 1 channels"]:
    """Shapes a vector to broadcast over an NHWC map; ranks never promote in silence here."""
    return vector.reshape(1, 1, 1, -1)


def broadcast_to_map(
    values: Float[Array, "#batch 1 1 channels"], shape: tuple[int, ...]
) -> FeatureMap:
    """Repeats one value for each channel, or each image and channel, over a map of this shape.

    By a gradient rule of its own: JAX would add up the gradient of a bfloat16 map in bfloat16,
    whose eight bits lose most of a million pixels; the rule does so in at least float32.
    """
    axes = (1, 2) if values.shape[0] == shape[0] else (0, 1, 2)

    @jax.custom_vjp
    def broadcast(values: Array) -> Array:
        return jnp.broadcast_to(values, shape)

    def backward(_: None, gradient: Array) -> tuple[Array]:
        wide = np.promote_types(gradient.dtype, np.float32)
        return (gradient.sum(axes, dtype=wide, keepdims=True).astype(values.dtype),)

    broadcast.defvjp(lambda values: (broadcast(values), None), backward)
    return broadcast(values)


def add_bias(x: FeatureMap, bias: Vector) -> FeatureMap:
    """Adds a bias to each channel of a map, in the map's dtype."""
    return x + broadcast_to_map(per_channel(bias.astype(x.dtype)), x.shape)


class Conv(nnx.Module):
    """Square 2-D convolution, padded as torch pads: evenly, by `dilation · (size − 1) / 2`.

    Flax's SAME pads an even map (0, 1) at stride 2, which gives the same shape and other numbers.
    Several maps are concatenated first. Convolved by shares of the kernel and added, they would
    cost a training step 4 to 7 % on a CPU. From (batch, height, width, inputs) to (batch,
    height / stride, width / stride, outputs), sides rounded up.

    Args:
        inputs: Input channels, of all maps together.
        outputs: Output channels.
        size: Kernel height and width, odd.
        stride: Step in both directions.
        dilation: Distance between taps.
        depthwise: One filter per channel; needs `inputs == outputs`.
        bias: Whether a bias is added.
        kernel_init: What the kernel is drawn from; None is torch's default.
        rngs: Source of the `params` stream.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> Conv(3, 8, 3, stride=2, rngs=nnx.Rngs(0))(jnp.ones((1, 32, 48, 3))).shape
        (1, 16, 24, 8)
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        depthwise: bool = False,
        bias: bool = False,
        kernel_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        shape = (size, size, 1 if depthwise else inputs, outputs)
        uniform = torch_uniform(fan_in=size * size * shape[2])
        self.kernel = nnx.Param((kernel_init or uniform)(rngs.params(), shape))
        self.bias = nnx.Param(uniform(rngs.params(), (outputs,))) if bias else None
        self.stride = stride
        self.dilation = dilation
        self.depthwise = depthwise

    def __call__(self, *maps: FeatureMap) -> FeatureMap:
        x = maps[0] if len(maps) == 1 else jnp.concatenate(maps, axis=-1)
        y = convolution(
            x,
            self.kernel[...].astype(x.dtype),
            stride=self.stride,
            dilation=self.dilation,
            depthwise=self.depthwise,
        )
        return y if self.bias is None else add_bias(y, self.bias[...])


class SeparableConv(nnx.Module):
    """A depthwise convolution and a 1×1 convolution, nothing between (Chollet, CVPR 2017).

    For 9 · inputs + inputs · outputs weights it sees what a 3×3 convolution of 9 · inputs · outputs
    sees. From (batch, height, width, inputs) to (batch, height, width, outputs).

    Args:
        inputs: Input channels, of all maps together.
        outputs: Output channels.
        size: Height and width of the depthwise kernel, odd.
        dilation: Distance between its taps.
        rngs: Source of the `params` stream.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> SeparableConv(16, 8, 3, dilation=6, rngs=nnx.Rngs(0))(jnp.ones((1, 8, 8, 16))).shape
        (1, 8, 8, 8)
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, dilation: int = 1, rngs: nnx.Rngs):
        self.depthwise = Conv(inputs, inputs, size, dilation=dilation, depthwise=True, rngs=rngs)
        self.pointwise = Conv(inputs, outputs, 1, rngs=rngs)

    def __call__(self, *maps: FeatureMap) -> FeatureMap:
        return self.pointwise(self.depthwise(*maps))


class UpConv(nnx.Module):
    """Transposed convolution, 2×2 with stride 2: doubles height and width.

    Windows do not overlap, so it is one matrix product per input pixel and a reshape. From (batch,
    height, width, inputs) to (batch, 2·height, 2·width, outputs).

    Args:
        inputs: Input channels.
        outputs: Output channels.
        rngs: Source of the `params` stream.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> UpConv(16, 8, rngs=nnx.Rngs(0))(jnp.ones((1, 8, 12, 16))).shape
        (1, 16, 24, 8)
    """

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        # torch takes the fan-in of a transposed kernel from its output side.
        uniform = torch_uniform(fan_in=4 * outputs)
        self.kernel = nnx.Param(uniform(rngs.params(), (inputs, 2, 2, outputs)))
        self.bias = nnx.Param(uniform(rngs.params(), (outputs,)))

    def __call__(self, x: FeatureMap) -> FeatureMap:
        inputs = x.shape[-1]
        kernel = self.kernel[...].astype(x.dtype)
        y = x.reshape(-1, inputs) @ kernel.reshape(inputs, -1)
        y = depth_to_space(y.reshape(*x.shape[:3], -1))
        return add_bias(y, self.bias[...])


EPSILON = 1e-5


@jax.custom_vjp
def normalize(
    x: FeatureMap, scale: Vector, bias: Vector, near: Vector
) -> tuple[FeatureMap, Vector, Vector]:
    """Normalises a map by its own statistics, by a gradient rule of its own.

    The rule keeps the map and two vectors for the backward pass. Differentiated by JAX, the
    statistics' arithmetic keeps the centred map too and passes over the maps more often; with that,
    a training step of batch 16 takes from no longer to a fifth longer, by processor.

    Args:
        x: The map.
        scale: Factors of the normalised map.
        bias: Summands.
        near: What the mean is expected near to, such as the running mean; changes rounding alone.

    Returns:
        The normalised map, its mean and its biased variance. The statistics carry no gradient.
    """
    return _normalize(x, scale, bias, near)[0]


def _normalize(x: FeatureMap, scale: Vector, bias: Vector, near: Vector) -> tuple:
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    statistics = _mean_and_variance if target_backend() == "cpu" else _mean_and_variance_at_once
    mean, var = statistics(wide, near.astype(wide.dtype))
    inverse = jax.lax.rsqrt(var + EPSILON)
    return (_affine(x, mean, scale * inverse, bias), mean, var), (x, scale, mean, inverse)


def _mean_and_variance(x: FeatureMap, near: Vector) -> tuple[Vector, Vector]:
    del near
    mean = x.mean((0, 1, 2))
    return mean, jnp.square(x - per_channel(mean)).mean((0, 1, 2))


def _mean_and_variance_at_once(x: FeatureMap, near: Vector) -> tuple[Vector, Vector]:
    """Reads the map once: on a GPU, memory is what limits, and two sums are one collective.

    E[x²] − E[x]² loses the digits that the mean is larger than the deviation by; of distances from
    a value near the mean, it loses none that matter.
    """
    distance = x - per_channel(near)
    count = x.size // x.shape[-1]
    offset, square = (sums / count for sums in _channel_sums(distance, distance))
    return near + offset, jnp.maximum(square - jnp.square(offset), 0)


def _channel_sums(x: FeatureMap, factor: FeatureMap) -> tuple[Vector, Vector]:
    """Returns each channel's sum of a map, and of its product with another map."""
    if target_backend() == "cpu":
        return x.sum((0, 1, 2)), (x * factor.astype(x.dtype)).sum((0, 1, 2))
    # A GPU's kernel leaves a sum for each of its blocks. Those of both, in one array, take one more
    # kernel, and on several GPUs one collective that nothing is copied together for.
    channels = x.shape[-1]
    pixels, blocks = x.size // channels, x.shape[0]
    while pixels // blocks > min(blocks, 1024) and pixels // blocks % 2 == 0:
        blocks *= 2
    maps = (x, x * factor.astype(x.dtype))
    of_blocks = jnp.stack([each.reshape(blocks, -1, channels).sum(1) for each in maps])
    sums, products = of_blocks.sum(1)
    return sums, products


def _normalize_backward(saved: tuple, gradients: tuple) -> tuple:
    x, scale, mean, inverse = saved
    gradient = gradients[0].astype(mean.dtype)
    by_bias, products = _channel_sums(gradient, x)
    # Not by the centred map, which XLA would then keep from the forward pass on, beside the map.
    # No digits are lost: the map's own rounding is relative to its distance from zero, too.
    by_scale = (products - mean * by_bias) * inverse
    count = x.size // x.shape[-1]
    centred = x.astype(mean.dtype) - per_channel(mean)
    common = per_channel(by_bias / count) + centred * per_channel(by_scale * inverse / count)
    by_x = per_channel(scale * inverse) * (gradient - common)
    return by_x.astype(x.dtype), by_scale, by_bias, jnp.zeros_like(mean)


normalize.defvjp(_normalize, _normalize_backward)


def _affine(x: FeatureMap, mean: Vector, gain: Vector, bias: Vector) -> FeatureMap:
    """Returns `(x − mean) · gain + bias` in the map's dtype, computed in the vectors'."""
    centred = x.astype(mean.dtype) - per_channel(mean)
    return (centred * per_channel(gain) + per_channel(bias)).astype(x.dtype)


class BatchNorm(nnx.Module):
    """Batch normalisation as `torch.nn.BatchNorm2d` computes it.

    Epsilon 1e-5; running average `0.9·old + 0.1·new`; the running variance is fed with the
    unbiased batch variance, while the map is normalised with the biased one. Flax differs in the
    momentum's default and feeds the biased variance. Statistics are taken in at least float32,
    the variance about the mean, or on a GPU about the running mean, and not as E[x²] − E[x]², which
    loses digits. Over a batch that is
    sharded under `jax.jit` the means are global. From (batch, height, width, channels) to the same
    shape.

    Args:
        channels: Channels of the map.

    Raises:
        InputError: A call in training has one value per channel, which has no variance.

    Example:
        >>> import jax.numpy as jnp
        >>> norm = BatchNorm(2)
        >>> x = jnp.array([0.0, 4.0, 2.0, 4.0]).reshape(1, 1, 2, 2)
        >>> norm.train()
        >>> norm(x).round(3)
        Array([[[[-1.,  0.],
                 [ 1.,  0.]]]], dtype=float32)
        >>> norm.mean[...], norm.var[...]
        (Array([0.1, 0.4], dtype=float32), Array([1.1, 0.9], dtype=float32))
    """

    momentum = 0.1

    def __init__(self, channels: int):
        # By jnp.ones, each number of channels would be a program to compile.
        zeros, ones = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        self.scale = nnx.Param(jax.device_put(ones))
        self.bias = nnx.Param(jax.device_put(zeros))
        self.mean = nnx.BatchStat(jax.device_put(zeros))
        self.var = nnx.BatchStat(jax.device_put(ones))
        # What nnx.Module.train and eval set, by this name.
        self.use_running_average = True

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Serves `nnx.view`, which makes a module that trains beside one that evaluates.

        Args:
            use_running_average: Whether a call without `train` evaluates; None leaves that as is.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(self, x: FeatureMap, *, train: bool | None = None) -> FeatureMap:
        if train is None:
            train = not self.use_running_average
        if train:
            y, mean, var = normalize(x, self.scale[...], self.bias[...], self.mean[...])
            self._update_running(mean, var, count=x.size // x.shape[-1])
            return y
        gain = self.scale[...] * jax.lax.rsqrt(self.var[...] + EPSILON)
        return _affine(x, self.mean[...], gain, self.bias[...])

    def running_affine(self) -> tuple[Vector, Vector]:
        """Returns the factor and the summand that the layer is in evaluation."""
        gain = self.scale[...] * jax.lax.rsqrt(self.var[...] + EPSILON)
        return gain, self.bias[...] - gain * self.mean[...]

    def _update_running(self, mean: Vector, var: Vector, count: int) -> None:
        if count < 2:
            raise InputError(
                "batch normalisation in training needs more than one value per channel: "
                "use a larger batch or image"
            )
        unbiased = var * (count / (count - 1))
        keep = 1 - self.momentum
        # Not by `self.mean[...] =`, which asks tracers for their sharding: JAX searches the whole
        # trace for the words of its refusal, a quarter of the time that tracing a step takes.
        self.mean.set_value(keep * self.mean[...] + self.momentum * jax.lax.stop_gradient(mean))
        self.var.set_value(keep * self.var[...] + self.momentum * jax.lax.stop_gradient(unbiased))
