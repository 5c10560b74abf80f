"""Convolution as PyTorch pads it, in the cheapest exact form for the backend and the shapes.

Every form computes the same sum as `plain_convolution`; tests/models/test_convolution.py holds
each to it, forward and gradient, in float64. benchmarks/convolutions.py measures what each saves.
"""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from fetal_flax._util.backend import target_backend

FeatureMap = Float[Array, "batch height width channels"]
Kernel = Float[Array, "rows columns inputs outputs"]


def compiler_options(*, deterministic: bool = False) -> dict[str, str | bool]:
    """Returns what to give to `jax.jit` where convolutions run.

    On a GPU, `deterministic` forbids what sums in no fixed order, such as atomic additions; a CPU
    does nothing of the kind.

    On a CPU, from jaxlib 0.10, XLA hands convolutions, matrix products and sums to the library YNN.
    Its convolutions take 1.1 to 2 times as long as the Eigen code that they replace at the shapes
    of these networks (benchmarks/convolutions.py), its products and sums do not: a training step of
    batch 16 takes 0.7 of what it takes by default. An XLA that doesn't know the option has nothing
    to turn off.
    """
    if target_backend() != "cpu":
        return {"xla_gpu_deterministic_ops": True} if deterministic else {}
    return dict(_cpu_options())


@functools.cache
def _cpu_options() -> dict[str, str | bool]:
    options: dict[str, str | bool] = {
        "xla_cpu_experimental_ynn_fusion_type": (
            "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
        )
    }
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=options)
    except (ValueError, jax.errors.JaxRuntimeError):
        return {}
    return options


def convolution(
    x: FeatureMap, kernel: Kernel, *, stride: int = 1, dilation: int = 1, depthwise: bool = False
) -> FeatureMap:
    """2-D convolution with padding `dilation · (size − 1) / 2` on every side.

    Args:
        x: Map of any height and width.
        kernel: Square with an odd size; its `inputs` are 1 if `depthwise`.
        stride: Step in both directions.
        dilation: Distance between taps.
        depthwise: One filter per channel.

    Returns:
        A map with `ceil(side / stride)` rows and columns.
    """
    if stride == 1:
        kernel = crop_kernel_to_input(kernel, dilation, x.shape[1], x.shape[2])
    if target_backend() == "cpu":
        if depthwise:
            return depthwise_by_shifts(stride, dilation, x, kernel)
        return nhwc_convolution(stride, dilation, x, kernel)
    if depthwise:
        return depthwise_on_gpu(stride, dilation, x, kernel)
    if kernel.shape[:2] == (1, 1) and stride == 1:
        return x @ kernel[0, 0]
    return plain_convolution(x, kernel, stride=stride, dilation=dilation)


def plain_convolution(
    x: FeatureMap, kernel: Kernel, *, stride: int = 1, dilation: int = 1, depthwise: bool = False
) -> FeatureMap:
    """The convolution as XLA does it, for odd kernels of any height and width."""
    rows, columns = (dilation * (size // 2) for size in kernel.shape[:2])
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((rows, rows), (columns, columns)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] if depthwise else 1,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def nhwc_convolution(stride: int, dilation: int, x: FeatureMap, kernel: Kernel) -> FeatureMap:
    """`plain_convolution`, not depthwise, whose gradients are convolutions NHWC × HWIO → NHWC.

    These alone XLA's CPU backend hands to Eigen wherever they stand. Those that JAX derives come
    in other layouts, which XLA brings into this one at the top of a program only: in a loop, as of
    several training steps, they ran more than thirty times as long.
    """
    return plain_convolution(x, kernel, stride=stride, dilation=dilation)


def _forward(
    stride: int, dilation: int, x: FeatureMap, kernel: Kernel
) -> tuple[FeatureMap, tuple[FeatureMap, Kernel]]:
    return nhwc_convolution(stride, dilation, x, kernel), (x, kernel)


def _backward(
    stride: int, dilation: int, saved: tuple[FeatureMap, Kernel], gradient: FeatureMap
) -> tuple[FeatureMap, Kernel]:
    x, kernel = saved
    nhwc = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    pads = [dilation * (size // 2) for size in kernel.shape[:2]]
    # Rows and columns at the end that no window reached.
    remainders = [x.shape[i] - 1 - (gradient.shape[i] - 1) * stride for i in (1, 2)]
    grad_x = nhwc(
        gradient,
        kernel[::-1, ::-1].transpose(0, 1, 3, 2),
        (1, 1),
        [(pad, pad + remainder) for pad, remainder in zip(pads, remainders, strict=True)],
        lhs_dilation=(stride, stride),
        rhs_dilation=(dilation, dilation),
    )
    # Summed over images and pixels: channels are the batch, images the channels.
    grad_kernel = nhwc(
        x.transpose(3, 1, 2, 0),
        gradient.transpose(1, 2, 0, 3),
        (dilation, dilation),
        [(pad, pad - remainder) for pad, remainder in zip(pads, remainders, strict=True)],
        rhs_dilation=(stride, stride),
    )
    return grad_x, grad_kernel.transpose(1, 2, 0, 3)


nhwc_convolution.defvjp(_forward, _backward)


def crop_kernel_to_input(kernel: Kernel, dilation: int, height: int, width: int) -> Kernel:
    """Drops the taps of a stride-1 kernel that read only padding on a map of this size.

    With padding equal to the dilation, a 3×3 kernel with dilation 12 or 18 is exactly a 1×1
    convolution on an 8×8 map: the other eight taps reach past it wherever they stand.
    """

    def live(size: int, side: int) -> slice:
        reach = min(size // 2, (side - 1) // dilation)
        return slice(size // 2 - reach, size // 2 + reach + 1)

    return kernel[live(kernel.shape[0], height), live(kernel.shape[1], width)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def depthwise_by_shifts(stride: int, dilation: int, x: FeatureMap, kernel: Kernel) -> FeatureMap:
    """Depthwise convolution as a shifted multiply-add for each tap of an odd kernel.

    XLA's CPU backend runs grouped convolutions channel by channel; as elementwise arithmetic the
    same sum vectorises over channels and fuses with its neighbours. The kernel's gradient has a
    rule of its own (`_sum_over_pixels`).
    """
    return _sum_of_shifts(stride, dilation, x, kernel)


def _sum_of_shifts(stride: int, dilation: int, x: FeatureMap, kernel: Kernel) -> FeatureMap:
    height, width = x.shape[1], x.shape[2]
    wide = np.promote_types(x.dtype, np.float32)
    padded = _pad(x, dilation, kernel)
    y = jnp.zeros((), wide)
    for row, column in np.ndindex(kernel.shape[:2]):
        top, left = dilation * row, dilation * column
        shifted = padded[:, top : top + height : stride, left : left + width : stride]
        y = y + shifted.astype(wide) * kernel[row, column, 0].astype(wide).reshape(1, 1, 1, -1)
    return y.astype(x.dtype)


def _depthwise_forward(
    stride: int, dilation: int, x: FeatureMap, kernel: Kernel
) -> tuple[FeatureMap, tuple[FeatureMap, Kernel]]:
    return _sum_of_shifts(stride, dilation, x, kernel), (x, kernel)


def _depthwise_backward(
    stride: int, dilation: int, saved: tuple[FeatureMap, Kernel], gradient: FeatureMap
) -> tuple[FeatureMap, Kernel]:
    x, kernel = saved
    _, pullback = jax.vjp(lambda x: _sum_of_shifts(stride, dilation, x, kernel), x)
    return *pullback(gradient), _sum_over_pixels(stride, dilation, x, kernel, gradient)


depthwise_by_shifts.defvjp(_depthwise_forward, _depthwise_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def depthwise_on_gpu(stride: int, dilation: int, x: FeatureMap, kernel: Kernel) -> FeatureMap:
    """Depthwise convolution as shifted multiply-adds, with the gradients of the plain one.

    What limits is memory: so the convolution is one kernel with the bias and activation before and
    behind it, each of which a library's convolution would have as a pass over the map of its own.
    """
    return _sum_of_shifts(stride, dilation, x, kernel)


def _depthwise_on_gpu_backward(
    stride: int, dilation: int, saved: tuple[FeatureMap, Kernel], gradient: FeatureMap
) -> tuple[FeatureMap, Kernel]:
    def plain(x: FeatureMap, kernel: Kernel) -> FeatureMap:
        return plain_convolution(x, kernel, stride=stride, dilation=dilation, depthwise=True)

    return jax.vjp(plain, *saved)[1](gradient)


depthwise_on_gpu.defvjp(_depthwise_forward, _depthwise_on_gpu_backward)


def _sum_over_pixels(
    stride: int, dilation: int, x: FeatureMap, kernel: Kernel, gradient: FeatureMap
) -> Kernel:
    """Returns the depthwise kernel's gradient: for each tap, shifted map times gradient, summed.

    Bands of rows come one after the other, and the rows of each are added up as maps of one row,
    which vectorises; only their sum is summed over images and columns. Summed over all at once, a
    product as large as the map would be written to memory for each tap: nine sums took 2.4 to 2.8
    times the processor time and six times the memory. Images stay a dimension of their own, so that
    a sharded batch stays where it is.
    """
    batch, height, width, channels = gradient.shape
    # As many rows as divide the height; more than 16 were no faster.
    band = math.gcd(height, 16)
    dtype = np.promote_types(x.dtype, np.float32)
    padded = _pad(x, dilation, kernel)
    taps = list(np.ndindex(kernel.shape[:2]))
    reach = stride * (band - 1) + dilation * (kernel.shape[0] - 1) + 1

    def add_band(index: Array, sums: list[Array]) -> list[Array]:
        rows = lax.dynamic_slice_in_dim(padded, stride * band * index, reach, 1).astype(dtype)
        factors = lax.dynamic_slice_in_dim(gradient, band * index, band, 1).astype(dtype)

        def products(row: int, column: int) -> Iterator[Array]:
            left = dilation * column
            columns = slice(left, left + stride * (width - 1) + 1, stride)
            for i in range(band):
                yield rows[:, stride * i + dilation * row, columns] * factors[:, i]

        return [
            functools.reduce(jnp.add, products(*tap), s) for tap, s in zip(taps, sums, strict=True)
        ]

    zeros = [jnp.zeros((batch, width, channels), dtype)] * len(taps)
    sums = lax.fori_loop(0, height // band, add_band, zeros)
    by_tap = jnp.stack([each.sum((0, 1)) for each in sums])
    return by_tap.reshape(kernel.shape).astype(kernel.dtype)


def _pad(x: FeatureMap, dilation: int, kernel: Kernel) -> FeatureMap:
    rows, columns = (dilation * (size // 2) for size in kernel.shape[:2])
    return jnp.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0)))


def depth_to_space(x: FeatureMap) -> FeatureMap:
    """Doubles height and width: channels (row, column, output) of a pixel become 2×2 pixels."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, 2 * height, 2 * width, channels // 4)


def compose_up_3x3(
    up: Float[Array, "inputs 2 2 between"],
    bias: Float[Array, " between"],
    kernel: Float[Array, "3 3 between outputs"],
) -> Float[Array, "2 2 inputs+1 4*outputs"]:
    """Returns the kernel for `up_convolution_3x3` of a transposed convolution and a 3×3 one.

    Together the two are a transposed 4×4 convolution with stride 2, whose kernel is what they make
    of a single pixel. The bias is one more input channel, which is 1 on the map and, like all
    others, 0 around it.
    """
    pixels = jnp.concatenate([up, jnp.broadcast_to(bias, (1, 2, 2, bias.size))])
    response = lax.conv_general_dilated(
        pixels, kernel, (1, 1), ((2, 2), (2, 2)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    inputs, outputs = len(pixels), kernel.shape[-1]
    # A row of the response is a tap and a row of the output: the upper pixel of a 2×2 window
    # gives the window's output with its lower half.
    taps = response.reshape(inputs, 2, 2, 2, 2, outputs)[:, ::-1, :, ::-1]
    return taps.transpose(1, 3, 0, 2, 4, 5).reshape(2, 2, inputs, 4 * outputs)


def up_convolution_3x3(
    x: FeatureMap, composed: Float[Array, "2 2 inputs+1 4*outputs"]
) -> FeatureMap:
    """2×2 transposed convolution with stride 2 and the 3×3 convolution behind it, as one.

    Between four pixels of the map, one 2×2 window gives 2×2 pixels of the result: 4 taps instead
    of 9 and no map in between. On a CPU 0.3 to 0.5 of the two at 32 channels, 0.7 where the map
    below has twice the channels (benchmarks/convolutions.py). The composed kernel is larger, and
    worth its making only where it serves many calls: in inference.
    """
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1)
    y = lax.conv_general_dilated(
        x, composed, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return depth_to_space(y)[:, 1:-1, 1:-1]
