"""PyTorch's initial distributions, as Flax initializers.

Given a key that has a value they draw on the host: compiled, the 150 draws of a network cost XLA
about 17 s on a CPU before the first step; NumPy needs none of it, and gives the same numbers
whatever the device. Given a key that is traced, as in `nnx.jit` or `nnx.vmap` around a
constructor, they draw by `jax.random`: the same distribution, other numbers.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, UInt32

_KEYS_AT_ONCE = 256


def torch_uniform(fan_in: int) -> nnx.Initializer:
    """What `torch.nn.Conv2d` and `torch.nn.Linear` draw kernels and biases from.

    Args:
        fan_in: Inputs that one output sums over; draws are from U(-1/√fan_in, 1/√fan_in).
    """
    limit = fan_in**-0.5
    return _initializer(
        lambda generator, shape: generator.uniform(-limit, limit, shape),
        lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit),
    )


def he_normal_fan_out(fan_out: int) -> nnx.Initializer:
    """What torchvision draws MobileNetV2's kernels from (He et al. 2015, mode "fan_out").

    Args:
        fan_out: Outputs that one input reaches; draws are from N(0, 2/fan_out).
    """
    deviation = (2 / fan_out) ** 0.5
    return _initializer(
        lambda generator, shape: generator.normal(0, deviation, shape),
        lambda key, shape, dtype: deviation * jax.random.normal(key, shape, dtype),
    )


class HostRngs:
    """The keys of `nnx.Rngs(params=seed)`, as NumPy arrays of their data.

    Folded in one by one, as Flax does it, they take as long as all else of building a network.

    Args:
        seed: Seeds the stream; None is for a trace that only wants shapes, and draws nothing.
    """

    def __init__(self, seed: int | None):
        self._keys = itertools.repeat(None) if seed is None else _keys(seed)

    def params(self) -> UInt32[np.ndarray, " words"] | None:
        """Returns the next key."""
        return next(self._keys)


def _keys(seed: int) -> Iterator[np.ndarray]:
    with jax.ensure_compile_time_eval():
        key = jax.random.key(seed)
    for first in itertools.count(step=_KEYS_AT_ONCE):
        counts = np.arange(first, first + _KEYS_AT_ONCE, dtype=np.uint32)
        with jax.ensure_compile_time_eval():
            keys = np.asarray(_fold_in(key, counts))
        yield from keys


@jax.jit
def _fold_in(key: Array, counts: Array) -> Array:
    return jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, counts))


def _initializer(
    on_host: Callable[[np.random.Generator, Sequence[int]], np.ndarray],
    in_trace: Callable[[Array, Sequence[int], DTypeLike], Array],
) -> nnx.Initializer:
    def initialize(
        key: np.ndarray | Array | None, shape, dtype: DTypeLike = np.float32, out_sharding=None
    ) -> Array:
        if key is None:
            return jnp.zeros(shape, dtype)
        if isinstance(key, np.ndarray):
            seed = key
        elif isinstance(key, Tracer):
            return in_trace(key, shape, dtype)
        else:
            seed = np.asarray(jax.random.key_data(key))
        # jnp.asarray would compile a program for each shape.
        return jax.device_put(on_host(np.random.default_rng(seed), shape).astype(dtype))

    return initialize
