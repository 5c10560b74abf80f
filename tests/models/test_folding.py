import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fetal_flax.config import ModelConfig
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL_UNET = ModelConfig(name="unet", base_width=4)
DESCRIBED = ModelConfig(aspp_width=32)
LARGE = (
    DESCRIBED,
    ModelConfig(variant="published", aspp_width=32, in_channels=3),
    ModelConfig(variant="compact"),
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


@functools.partial(jax.jit, static_argnums=0)
def _unfolded(config: ModelConfig, variables: Variables, images: jax.Array) -> jax.Array:
    return functional.merge(config, variables)(images)


@functools.partial(jax.jit, static_argnums=0)
def _folded(config: ModelConfig, variables: Variables, images: jax.Array) -> jax.Array:
    return functional.infer(config, functional.fold(config, variables), images)


@functools.partial(jax.jit, static_argnums=0)
def _applied(config: ModelConfig, variables: Variables, images: jax.Array) -> jax.Array:
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


@_networks(DESCRIBED)
def test_folding_batch_norms_alone_gives_the_same_function(config):
    with jax.enable_x64(True):
        variables, images = _variables(config, jnp.float64), _images(config, jnp.float64)
        logits = _applied(config, variables, images)
        assert _apart(logits, _unfolded(config, variables, images)) < 1e-12


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("config", (DESCRIBED, LARGE[-1]), ids=lambda config: config.title)
def test_training_beside_a_folded_encoder_is_the_same(config):
    """Loss, gradients and statistics."""
    config = dataclasses.replace(config, dropout=0.0)
    with jax.enable_x64(True):
        variables, images = _variables(config, jnp.float64), _images(config, jnp.float64)
        frozen = functional.encoder_part(variables).params
        learning = {n: a for n, a in variables.params.items() if n not in frozen}

        def plain(variables: Variables) -> tuple[jax.Array, dict]:
            network = functional.merge(config, variables)
            logits = network(images, train=True, dropout_key=jax.random.key(0))
            stats = nnx.to_flat_state(nnx.state(network, nnx.BatchStat))
            return logits, {"/".join(map(str, path)): a[...] for path, a in stats}

        def folded(variables: Variables) -> tuple[jax.Array, dict]:
            key = jax.random.key(0)
            return functional.apply_train(config, variables, images, dropout_key=key)

        def results(form: Callable) -> tuple:
            def loss(learning: dict) -> tuple[jax.Array, dict]:
                logits, stats = form(Variables(learning | frozen, variables.batch_stats))
                return (logits**2).mean(), stats

            return jax.jit(jax.value_and_grad(loss, has_aux=True))(learning)

        ((ours, our_stats), our_grads), ((theirs, stats), grads) = results(folded), results(plain)
        assert float(ours) == pytest.approx(float(theirs), rel=1e-12)
        assert our_stats.keys() == stats.keys() and our_grads.keys() == grads.keys()
        for name in stats:
            assert _apart(our_stats[name], stats[name]) < 1e-11, name
        largest = max(np.linalg.norm(a) for a in grads.values())
        for name in grads:
            difference = np.linalg.norm(our_grads[name] - grads[name])
            assert difference < 1e-10 * np.linalg.norm(grads[name]) + 1e-13 * largest, name


def test_nothing_of_a_frozen_encoder_is_saved_for_the_backward_pass():
    config = ModelConfig(name="mobilenet_unet")
    shapes = functional.shapes(config)
    frozen = functional.encoder_part(shapes).params
    inside = {144, 192, 384, 576, 960}  # Channels that only the encoder's maps have.

    def saved(learns: Callable[[str], bool]) -> set[int]:
        def pullback(variables: Variables, images: jax.Array) -> Callable:
            learning = {n: a for n, a in variables.params.items() if learns(n)}

            def logits(learning: dict) -> jax.Array:
                params = variables.params | learning
                both = Variables(params, variables.batch_stats)
                return functional.apply_train(config, both, images)[0]

            return jax.vjp(logits, learning)[1]

        images = jax.ShapeDtypeStruct((2, 32, 32, 1), jnp.float32)
        kept = jax.tree.leaves(jax.eval_shape(pullback, shapes, images))
        return {a.shape[-1] for a in kept if a.ndim == 4 and a.shape[0] == 2}

    assert not saved(lambda name: name not in frozen) & inside
    assert saved(lambda name: True) & inside
