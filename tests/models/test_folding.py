import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fetal_flax.config import ModelConfig
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables

QUICK_COMPILATION = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
SMALL_UNET = ModelConfig(name="unet", base_width=4)
DESCRIBED = ModelConfig(aspp_width=32)
LARGE = (
    DESCRIBED,
    ModelConfig(variant="published", aspp_width=32, in_channels=3),
    ModelConfig(name="mobilenet_unet"),
)


def _networks(*large: ModelConfig):
    """The small network, and larger ones, which take XLA half a minute, among the slow tests."""
    slow = [pytest.param(config, marks=pytest.mark.slow) for config in large]
    return pytest.mark.parametrize("config", [SMALL_UNET, *slow], ids=lambda config: config.title)


def _variables(config: ModelConfig, dtype) -> Variables:
    """Random ones, biases and statistics too, so that none can pass for another."""
    rng = np.random.default_rng(0)

    def random(name: str, shape: tuple[int, ...]) -> jax.Array:
        if name.endswith("kernel"):
            # Gains below one, that the maps neither vanish nor grow with depth.
            array = rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape)
        elif name.endswith(("scale", "var")):
            array = rng.uniform(0.5, 2, shape)
        else:
            array = rng.uniform(-0.5, 0.5, shape)
        return jnp.asarray(array, dtype)

    shapes = functional.shapes(config)
    return Variables(*({n: random(n, s.shape) for n, s in part.items()} for part in shapes))


def _images(config: ModelConfig, dtype) -> jax.Array:
    shape = (3, 32, 64, config.in_channels)
    return jnp.asarray(np.random.default_rng(1).uniform(size=shape), dtype)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK_COMPILATION)
def _unfolded(config: ModelConfig, variables: Variables, images: jax.Array) -> jax.Array:
    return functional.merge(config, variables)(images)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK_COMPILATION)
def _folded(config: ModelConfig, variables: Variables, images: jax.Array) -> jax.Array:
    return functional.infer(config, functional.fold(config, variables), images)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK_COMPILATION)
def _applied(config: ModelConfig, variables: Variables, images: jax.Array) -> tuple:
    return functional.apply(config, variables, images)


def _apart(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@_networks(*LARGE)
def test_a_folded_network_is_the_same_function(config):
    with jax.enable_x64(True):
        variables, images = _variables(config, jnp.float64), _images(config, jnp.float64)
        logits = _unfolded(config, variables, images)
        assert np.ptp(logits, axis=(1, 2)).min() > 1e-3
        assert _apart(_folded(config, variables, images), logits) < 1e-12


@_networks(*LARGE)
def test_folding_batch_norms_alone_gives_the_same_function_and_statistics(config):
    with jax.enable_x64(True):
        variables, images = _variables(config, jnp.float64), _images(config, jnp.float64)
        logits, batch_stats = _applied(config, variables, images)
        assert _apart(logits, _unfolded(config, variables, images)) < 1e-12
    assert batch_stats.keys() == variables.batch_stats.keys()
    for name, array in variables.batch_stats.items():
        np.testing.assert_array_equal(batch_stats[name], array)


@_networks(DESCRIBED)
def test_in_float32_folding_costs_no_digits(config):
    """Each form rounds a hundred or so times in a row, in its own way; neither is the better."""
    variables, images = _variables(config, jnp.float32), _images(config, jnp.float32)
    plain, folded = _unfolded(config, variables, images), _folded(config, variables, images)
    assert folded.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = Variables(
            *({n: jnp.asarray(a, jnp.float64) for n, a in part.items()} for part in variables)
        )
        exact = _unfolded(config, wide, jnp.asarray(images, jnp.float64))
    assert _apart(plain, exact) < 5e-6
    assert _apart(folded, exact) < 5e-6


@_networks(DESCRIBED)
def test_in_bfloat16_a_folded_network_is_near_to_float32(config):
    variables, images = _variables(config, jnp.float32), _images(config, jnp.float32)
    exact = _unfolded(config, variables, images)
    rough = _folded(dataclasses.replace(config, dtype="bfloat16"), variables, images)
    assert rough.dtype == jnp.float32
    assert 0 < _apart(rough, exact) < 0.02


def test_a_folded_network_has_no_batch_norms_and_no_upsampling_left():
    variables = _variables(SMALL_UNET, jnp.float32)
    before = jax.tree.map(np.array, variables)
    names = functional.fold(SMALL_UNET, variables).keys()
    assert not any("norm/" in name for name in names)
    assert "stage1/block/first/conv/up/kernel" in names and "stage1/up/kernel" not in names
    jax.tree.map(np.testing.assert_array_equal, variables, before)
