"""PyTorch's initial distributions, drawn on the host.

Compiled, the 150 draws of a network cost XLA about 17 s on a CPU before the first step; NumPy
needs none of it, and gives the same numbers whatever the device.
"""

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array


def torch_uniform(fan_in: int) -> nnx.Initializer:
    """What `torch.nn.Conv2d` and `torch.nn.Linear` draw kernels and biases from.

    Args:
        fan_in: Inputs that one output sums over; draws are from U(-1/√fan_in, 1/√fan_in).
    """
    limit = fan_in**-0.5
    return _host(lambda generator, shape: generator.uniform(-limit, limit, shape))


def he_normal_fan_out(fan_out: int) -> nnx.Initializer:
    """What torchvision draws MobileNetV2's kernels from (He et al. 2015, mode "fan_out").

    Args:
        fan_out: Outputs that one input reaches; draws are from N(0, 2/fan_out).
    """
    deviation = (2 / fan_out) ** 0.5
    return _host(lambda generator, shape: generator.normal(0, deviation, shape))


def _host(draw) -> nnx.Initializer:
    def initialize(key: Array, shape, dtype: DTypeLike = np.float32, out_sharding=None) -> Array:
        def callback(seed):
            return draw(np.random.default_rng(np.asarray(seed)), shape).astype(dtype)

        # A callback, so that initialisation can be traced (eval_shape, jit) like any other.
        return jax.pure_callback(
            callback, jax.ShapeDtypeStruct(shape, dtype), jax.random.key_data(key)
        )

    return initialize
