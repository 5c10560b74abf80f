import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fetal_flax.config import ModelConfig
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables

pytestmark = pytest.mark.usefixtures("quick_compilation")
DESCRIBED = ModelConfig()
SMALL_UNET = ModelConfig(name="unet", base_width=4)


@functools.cache
def _initialised(config: ModelConfig) -> Variables:
    return functional.init(config, 0)


@functools.cache
def _compiled(config: ModelConfig, train: bool = False, train_encoder: bool = False) -> Callable:
    """The network with random arrays, a function of images and a dropout key."""

    def forward(variables, images, key):
        if not train:
            return functional.apply(config, variables, images), variables.batch_stats
        return functional.apply_train(
            config, variables, images, dropout_key=key, train_encoder=train_encoder
        )

    run = jax.jit(forward)
    variables = _initialised(dataclasses.replace(config, dtype="float32"))
    return lambda images, key=0: run(variables, images, jax.random.key(key))


def _images(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).uniform(size=shape), jnp.float32)


def _differing(ours: dict, theirs: dict) -> set[str]:
    return {name for name in ours if not np.array_equal(ours[name], theirs[name])}


def test_init_depends_on_the_seed_alone():
    first, again, other = (functional.init(SMALL_UNET, seed) for seed in (3, 3, 4))
    assert not _differing(first.params, again.params)
    kernels = {name for name in first.params if "kernel" in name}
    assert kernels and _differing(first.params, other.params) >= kernels


def test_no_two_layers_begin_alike():
    params = _initialised(DESCRIBED).params
    kernels = [np.asarray(a).ravel()[:8] for name, a in params.items() if name.endswith("kernel")]
    assert len({kernel.tobytes() for kernel in kernels}) == len(kernels)


def test_shapes_are_those_of_init():
    shapes, arrays = functional.shapes(SMALL_UNET), functional.init(SMALL_UNET, 0)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), arrays) == jax.tree.map(
        lambda a: (a.shape, a.dtype), shapes
    )


@pytest.mark.parametrize(
    "config",
    [pytest.param(DESCRIBED, marks=pytest.mark.slow), SMALL_UNET],
    ids=["described", "unet"],
)
def test_bfloat16_gives_float32_logits_near_those_of_float32(config):
    images = _images(2, 64, 64, 1)
    exact, _ = _compiled(config)(images)
    rough, _ = _compiled(dataclasses.replace(config, dtype="bfloat16"))(images)
    assert rough.dtype == jnp.float32
    assert 0 < np.linalg.norm(rough - exact) < 0.02 * np.linalg.norm(exact)


def test_bfloat16_keeps_statistics_in_float32():
    config = dataclasses.replace(SMALL_UNET, dtype="bfloat16")
    _, batch_stats = _compiled(config, train=True)(_images(2, 32, 32, 1))
    assert {array.dtype.name for array in batch_stats.values()} == {"float32"}


@pytest.mark.parametrize(
    "config",
    [DESCRIBED, pytest.param(ModelConfig(name="mobilenet_unet"), marks=pytest.mark.slow)],
    ids=lambda config: config.title,
)
def test_evaluation_needs_no_key_nor_an_encoder_beside_its_features(config):
    def whole_and_by_features(variables: Variables, images: jax.Array) -> tuple[jax.Array, ...]:
        features = functional.encode(config, variables, images)
        halves = functional.apply(config, variables, images, features=features)
        return functional.apply(config, variables, images), halves, *features

    run = jax.jit(whole_and_by_features)
    whole, halves, *features = run(_initialised(config), _images(2, 64, 64, 1))
    assert [array.shape[-1] for array in features] == [16, 24, 32, 96, 1280]
    assert np.isfinite(whole).all() and np.ptp(np.asarray(whole)) > 0
    np.testing.assert_allclose(halves, whole, atol=1e-5 * np.ptp(np.asarray(whole)))


@pytest.mark.slow
@pytest.mark.parametrize("train_encoder", [False, True])
def test_training_updates_the_encoders_statistics_only_on_request(train_encoder):
    before = _initialised(DESCRIBED).batch_stats
    _, after = _compiled(DESCRIBED, True, train_encoder)(_images(2, 64, 64, 1))
    encoder = {name for name in before if name.startswith("encoder/")}
    expected = before.keys() if train_encoder else before.keys() - encoder
    assert after.keys() == before.keys()
    assert _differing(before, after) == expected


@pytest.mark.slow
def test_dropout_depends_on_the_key_alone():
    run, images = _compiled(DESCRIBED, train=True), _images(2, 64, 64, 1)
    (first, _), (again, _), (other, _) = run(images, 0), run(images, 0), run(images, 1)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_encoder_part_is_the_encoder_alone():
    part = functional.encoder_part(functional.shapes(DESCRIBED))
    assert functional.STEM in part.params
    assert len(part.params) + len(part.batch_stats) == 52 + 4 * 52
    assert not any(functional.encoder_part(functional.shapes(SMALL_UNET)))
