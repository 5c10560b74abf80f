"""What each form of a convolution takes beside the plain one, on this machine.

    python benchmarks/convolutions.py

Forward and backward together, float32, batch 16, the shapes of `mobilenet_aspp_se_unet` at
256×256, the last ones those of its compact variant; then the composed up-convolutions of inference,
forward, batch 1. Runs alternate and medians are compared. Below 1 the chosen form is faster than
the plain one; the last column is the plain one with XLA's default options over that without
(models/convolution.py, compiler_options).
"""

import functools
import statistics

import jax
import jax.numpy as jnp
from timing import time_interleaved

from fetal_flax.models.convolution import (
    compiler_options,
    compose_up_3x3,
    convolution,
    depth_to_space,
    plain_convolution,
    up_convolution_3x3,
)

BATCH, REPEATS = 16, 7
# Name, side, inputs, outputs, kernel size, settings.
CASES = (
    ("init_conv 3×3", 256, 1, 32, 3, {}),
    ("stage1 first 3×3", 256, 64, 32, 3, {}),
    ("stage2 first 3×3", 128, 48, 32, 3, {}),
    ("stage3 first 3×3", 64, 88, 64, 3, {}),
    ("stage1 shortcut 1×1", 256, 64, 32, 1, {}),
    ("encoder depthwise, stride 1", 128, 32, 32, 3, {"depthwise": True}),
    ("encoder depthwise, stride 2", 128, 96, 96, 3, {"depthwise": True, "stride": 2}),
    ("ASPP, dilation 6", 8, 1280, 128, 3, {"dilation": 6}),
    ("ASPP, dilation 18", 8, 1280, 128, 3, {"dilation": 18}),
    ("compact ASPP depthwise, dilation 6", 8, 1280, 1280, 3, {"depthwise": True, "dilation": 6}),
    ("compact stage2 first depthwise", 128, 48, 48, 3, {"depthwise": True}),
    ("compact stage1 second depthwise", 256, 16, 16, 3, {"depthwise": True}),
)
# Side, inputs, outputs of the decoder's stages 5 to 1.
UP_CASES = ((8, 512, 256), (16, 256, 128), (32, 128, 64), (64, 64, 32), (128, 32, 32))


def main() -> None:
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {jax.device_count()} device(s)")
    for name, side, inputs, outputs, size, settings in CASES:
        depth = 1 if settings.get("depthwise") else inputs
        x = jnp.ones((BATCH, side, side, inputs))
        kernel = jnp.ones((size, size, depth, outputs))
        forms = [
            gradients(convolution, compiler_options(), **settings),
            gradients(plain_convolution, compiler_options(), **settings),
            gradients(plain_convolution, {}, **settings),
        ]
        print_row(name, [functools.partial(form, x, kernel) for form in forms])
    print()
    for side, inputs, outputs in UP_CASES:
        x = jnp.ones((1, side, side, inputs))
        up, bias = jnp.ones((inputs, 2, 2, outputs)), jnp.ones(outputs)
        kernel = jnp.ones((3, 3, outputs, outputs))
        composed = jax.jit(up_convolution_3x3, compiler_options=compiler_options())
        calls = [functools.partial(composed, x, compose_up_3x3(up, bias, kernel))]
        for options in (compiler_options(), {}):
            two = jax.jit(up_then_convolution, compiler_options=options)
            calls.append(functools.partial(two, x, up, bias, kernel))
        print_row(f"up-convolution from {side}², 3×3", calls)


def print_row(name: str, calls: list) -> None:
    seconds = time_interleaved(dict(enumerate(calls)), REPEATS)
    chosen, plain, default = map(statistics.median, seconds.values())
    times = f"{1e3 * chosen:8.1f} ms  plain {1e3 * plain:8.1f} ms  {chosen / plain:.2f}"
    print(f"{name:34s} {times}  {default / plain:.2f}", flush=True)


def gradients(form, options, **settings):
    """Returns the form's output and both gradients as one compiled function."""

    def both(x, kernel):
        y, pullback = jax.vjp(functools.partial(form, **settings), x, kernel)
        return y, pullback(y)

    return jax.jit(both, compiler_options=options)


def up_then_convolution(x, up, bias, kernel):
    y = x.reshape(-1, len(up)) @ up.reshape(len(up), -1)
    y = depth_to_space(y.reshape(*x.shape[:3], -1)) + bias.reshape(1, 1, 1, -1)
    return plain_convolution(y, kernel)


if __name__ == "__main__":
    main()
