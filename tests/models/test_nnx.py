"""Blocks and networks do what users of Flax NNX expect of a module."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fetal_flax.config import ModelConfig
from fetal_flax.errors import InputError
from fetal_flax.models import (
    ASPP,
    BatchNorm,
    Conv,
    ConvNorm,
    DoubleConv,
    InvertedResidual,
    MobileNetV2,
    PlainStage,
    ResidualSEBlock,
    SeparableConv,
    SEStage,
    SqueezeExcite,
    UpConv,
    create_model,
)
from fetal_flax.models.unet import UNet

pytestmark = pytest.mark.usefixtures("quick_compilation")

Build = Callable[[nnx.Rngs], nnx.Module]
SMALL: dict[str, Build] = {
    "Conv": lambda rngs: Conv(3, 4, 3, bias=True, rngs=rngs),
    "SeparableConv": lambda rngs: SeparableConv(3, 4, 3, rngs=rngs),
    "UpConv": lambda rngs: UpConv(3, 4, rngs=rngs),
    "BatchNorm": lambda rngs: BatchNorm(3),
    "ConvNorm": lambda rngs: ConvNorm(3, 4, 3, rngs=rngs),
    "DoubleConv": lambda rngs: DoubleConv(3, 4, rngs=rngs),
    "SqueezeExcite": lambda rngs: SqueezeExcite(32, bias=True, rngs=rngs),
    "ResidualSEBlock": lambda rngs: ResidualSEBlock(3, 4, rngs=rngs),
    "ASPP": lambda rngs: ASPP(3, 32, 4, dropout=0.5, rngs=rngs),
    "InvertedResidual": lambda rngs: InvertedResidual(3, 3, 1, 6, rngs=rngs),
    "SEStage": lambda rngs: SEStage(4, 3, 2, rngs=rngs),
    "PlainStage": lambda rngs: PlainStage(4, 3, 2, skip_first=True, rngs=rngs),
    "unet": lambda rngs: create_model(ModelConfig(name="unet", base_width=2), rngs=rngs),
}
LARGE: dict[str, Build] = {
    "MobileNetV2": lambda rngs: MobileNetV2(1, rngs=rngs),
    "described": lambda rngs: create_model(ModelConfig(variant="described"), rngs=rngs),
    "published": lambda rngs: create_model(ModelConfig(variant="published"), rngs=rngs),
    "compact": lambda rngs: create_model(ModelConfig(variant="compact"), rngs=rngs),
    "mobilenet_unet": lambda rngs: create_model(ModelConfig(name="mobilenet_unet"), rngs=rngs),
}
ALL = SMALL | LARGE


def small_and(*fast: str) -> list:
    """Names of all blocks and networks, where large ones not named here are for the slow tests."""
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in LARGE if name not in fast]
    return [*SMALL, *fast, *slow]


def _signature(module: nnx.Module) -> dict:
    """What each variable is, by its place."""
    return {
        path: (type(variable), variable.shape, variable.dtype)
        for path, variable in nnx.to_flat_state(nnx.state(module))
    }


def _arrays(module: nnx.Module, *kinds: type) -> dict[tuple, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(module, nnx.Any(*kinds) if kinds else ...))
    return {path: np.array(variable[...]) for path, variable in flat}


def _differing(ours: dict, theirs: dict) -> set:
    assert ours.keys() == theirs.keys()
    return {path for path in ours if not np.array_equal(ours[path], theirs[path])}


@pytest.mark.parametrize("name", small_and("described"))
def test_eval_shape_of_a_constructor_is_the_module_without_arrays(name):
    abstract = nnx.eval_shape(lambda: ALL[name](nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(abstract))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    concrete = ALL[name](nnx.Rngs(0))
    assert _signature(abstract) == _signature(concrete)
    assert nnx.graphdef(abstract) == nnx.graphdef(concrete)


@pytest.mark.parametrize("name", small_and())
def test_jit_of_a_constructor_draws_what_the_constructor_draws(name):
    """Other numbers of the same distribution; what is not drawn is equal."""
    compiled = nnx.jit(lambda: ALL[name](nnx.Rngs(0)))()
    module = ALL[name](nnx.Rngs(0))
    assert _signature(compiled) == _signature(module)
    ours, theirs = _arrays(compiled), _arrays(module)
    for path, array in ours.items():
        expected = theirs[path]
        drawn = path[-1] == "kernel" or not np.isin(expected, (0, 1)).all()
        assert np.array_equal(array, expected) != drawn, path
        if drawn and array.size > 1000:
            assert array.std() == pytest.approx(expected.std(), rel=0.15), path


@pytest.mark.parametrize("name", small_and())
def test_parameters_and_statistics_split_and_merge(name):
    module = ALL[name](nnx.Rngs(0))
    graph, params, batch_stats = nnx.split(module, nnx.Param, nnx.BatchStat)
    merged = nnx.merge(graph, params, batch_stats)
    assert type(merged) is type(module)
    assert not _differing(_arrays(merged), _arrays(module))
    assert _arrays(module, nnx.Param) and _arrays(module, nnx.Param).keys() == {
        path for path, _ in nnx.to_flat_state(params)
    }


def test_vmap_of_a_constructor_makes_an_ensemble():
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def build(rngs: nnx.Rngs) -> Conv:
        return Conv(3, 4, 3, rngs=rngs)

    kernel = np.asarray(build(nnx.Rngs(0)).kernel[...])
    assert kernel.shape == (2, 3, 3, 3, 4)
    assert not np.array_equal(*kernel)


def _x(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def _norms(module: nnx.Module) -> list[BatchNorm]:
    return [part for _, part in nnx.iter_modules(module) if isinstance(part, BatchNorm)]


def test_train_and_eval_are_what_a_call_without_train_does():
    x = _x(2, 4, 4, 3)
    modes: dict[str, Callable[[ConvNorm], None]] = {
        "new": lambda block: None,
        "train": lambda block: block.train(),
        "eval": lambda block: (block.train(), block.eval())[1],
    }
    for mode, set_mode in modes.items():
        ours, theirs = (ConvNorm(3, 4, 3, rngs=nnx.Rngs(0)) for _ in range(2))
        set_mode(ours)
        np.testing.assert_array_equal(ours(x), theirs(x, train=mode == "train"))
        assert not _differing(_arrays(ours), _arrays(theirs))


def test_a_calls_own_train_wins_over_the_modules():
    x = _x(2, 4, 4, 3)
    block = ConvNorm(3, 4, 3, rngs=nnx.Rngs(0))
    evaluated = block(x)
    block.train()
    before = _arrays(block)
    np.testing.assert_array_equal(block(x, train=False), evaluated)
    assert not _differing(_arrays(block), before)


def test_a_view_trains_beside_a_module_that_evaluates():
    block = ASPP(3, 32, 4, dropout=0.5, rngs=nnx.Rngs(0))
    view = nnx.view(block, deterministic=False, use_running_average=False)
    assert not view.dropout.deterministic and block.dropout.deterministic
    assert {norm.use_running_average for norm in _norms(view)} == {False}
    assert {norm.use_running_average for norm in _norms(block)} == {True}


def test_dropout_in_training_needs_a_key_and_follows_the_mode():
    block = ASPP(3, 32, 64, dropout=0.5, rngs=nnx.Rngs(0))
    x = _x(2, 4, 4, 3)
    kept = np.asarray(block(x, dropout_key=jax.random.key(0)))
    np.testing.assert_array_equal(kept, block(x))
    block.train()
    with pytest.raises(InputError, match="dropout_key"):
        block(x)
    dropped = [np.asarray(block(x, dropout_key=jax.random.key(n))) for n in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert not np.array_equal(dropped[0], dropped[2])


def _count_updates(monkeypatch, model: nnx.Module, **options) -> int:
    """How many batch norms a call updates; nothing is computed."""
    updated = []
    monkeypatch.setattr(
        BatchNorm, "_update_running", lambda self, *arrays, **count: updated.append(self)
    )
    images = jax.ShapeDtypeStruct((2, 64, 64, 1), jnp.float32)
    nnx.eval_shape(lambda model, images: model(images, **options), model, images)
    return len(updated)


@pytest.mark.parametrize(
    "name",
    ["mobilenet_aspp_se_unet", pytest.param("mobilenet_unet", marks=pytest.mark.slow)],
)
def test_a_network_trains_its_encoder_with_the_rest_or_leaves_it(monkeypatch, name):
    model, key = create_model(ModelConfig(name=name), rngs=nnx.Rngs(0)), jax.random.key(0)
    assert not isinstance(model, UNet)
    inside, all_norms = len(_norms(model.encoder)), len(_norms(model))
    assert inside == 52
    assert _count_updates(monkeypatch, model) == 0
    model.train()
    assert _count_updates(monkeypatch, model, dropout_key=key) == all_norms
    assert _count_updates(monkeypatch, model, train=False) == inside
    model.encoder.eval()
    assert _count_updates(monkeypatch, model, dropout_key=key) == all_norms - inside
    options = {"train": False, "train_encoder": True}
    assert _count_updates(monkeypatch, model, **options) == inside


def test_a_block_learns_as_nnx_modules_do():
    """`nnx.Optimizer` and `nnx.jit`; statistics and parameters change in place."""
    block = ResidualSEBlock(3, 8, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(block, optax.sgd(0.05), wrt=nnx.Param)
    x, target = _x(4, 8, 8, 3), 0.1 * _x(4, 8, 8, 8)

    @nnx.jit
    def step(block: ResidualSEBlock, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(block: ResidualSEBlock) -> jax.Array:
            return jnp.square(block(x) - target).mean()

        value, gradients = nnx.value_and_grad(loss)(block)
        optimizer.update(block, gradients)
        return value

    block.train()
    before = _arrays(block)
    losses = [float(step(block, optimizer)) for _ in range(5)]
    assert losses[-1] < 0.9 * losses[0]
    assert _differing(_arrays(block), before) == before.keys()
