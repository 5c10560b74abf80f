import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from fetal_flax.config import EncoderConfig, ModelConfig, OptimizerConfig, TrainConfig
from fetal_flax.errors import InputError
from fetal_flax.models import functional
from fetal_flax.training.optimizer import (
    ENCODER,
    FROZEN,
    MAIN,
    create_optimizer,
    freezing_rules,
    initial_learning_rates,
    label_parameters,
)

LABELS = {"head/kernel": MAIN, "head/bias": MAIN, "encoder/a": ENCODER, "encoder/b": FROZEN}
SHAPES = {"head/kernel": (3, 4), "head/bias": (4,), "encoder/a": (2, 5), "encoder/b": (7,)}
NETWORKS = [
    ModelConfig(),
    ModelConfig(variant="published"),
    ModelConfig(variant="compact"),
    ModelConfig(name="mobilenet_unet"),
    ModelConfig(name="unet"),
]


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _random(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    # Gradients of very different size, so that epsilon counts.
    return {name: rng.normal(size=shape) * 10.0 ** (-4 * seed) for name, shape in SHAPES.items()}


def _update(
    optimizer: optax.GradientTransformationExtraArgs,
    gradients: Mapping[str, Any],
    state: optax.OptState,
    params: dict[str, jax.Array],
    rates: dict[str, float],
) -> tuple[dict[str, jax.Array], optax.OptState]:
    # optax mixes dtypes inside.
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(
            {name: jnp.asarray(array) for name, array in gradients.items()},
            state,
            params,
            learning_rates=rates,
        )
    return cast(dict[str, jax.Array], updates), state


@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.usefixtures("float64")
def test_ten_steps_are_those_of_torchs_adam(l2):
    config = OptimizerConfig(l2=l2, beta1=0.8, beta2=0.95, epsilon=1e-4)
    optimizer = create_optimizer(config, LABELS)
    params = {name: jnp.asarray(array) for name, array in _random(0).items()}
    state = optimizer.init(params)
    theirs = {name: torch.nn.Parameter(torch.tensor(a)) for name, a in _random(0).items()}
    adam = torch.optim.Adam(
        [
            {"params": [theirs[name] for name in LABELS if LABELS[name] == group]}
            for group in (MAIN, ENCODER)
        ],
        betas=(0.8, 0.95),
        eps=1e-4,
        weight_decay=l2,
    )
    for step in range(10):
        rates = {MAIN: 0.3 if step < 5 else 0.15, ENCODER: 0.03 if step < 7 else 0.01}
        gradients = _random(step % 3)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients[name])
        for group, rate in zip(adam.param_groups, rates.values(), strict=True):
            group["lr"] = rate
        adam.step()
        updates, state = _update(optimizer, gradients, state, params, rates)
        params = {name: array + updates[name] for name, array in params.items()}
        for name in SHAPES:
            reference = theirs[name].detach().numpy()
            assert params[name].dtype == jnp.float64
            np.testing.assert_allclose(params[name], reference, rtol=1e-10, err_msg=name)


def test_l2_enters_the_moments_and_is_not_decoupled():
    optimizer = create_optimizer(OptimizerConfig(l2=0.1), {"head/kernel": MAIN})
    params = {"head/kernel": jnp.asarray([5.0, -5.0], jnp.float32)}
    zeros = {"head/kernel": jnp.zeros(2)}
    updates, _ = _update(optimizer, zeros, optimizer.init(params), params, {MAIN: 0.01})
    # Adam's first step is the rate, whatever the gradient; AdamW's would be 0.1 · 5 of it.
    np.testing.assert_allclose(updates["head/kernel"], [-0.01, 0.01], rtol=1e-5)


def test_frozen_parameters_have_no_moments_and_no_update():
    params = {name: jnp.asarray(array, jnp.float32) for name, array in _random(0).items()}
    optimizer = create_optimizer(OptimizerConfig(), LABELS)
    state = optimizer.init(params)
    moments = sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim)
    learning = [shape for name, shape in SHAPES.items() if LABELS[name] != FROZEN]
    assert moments == sorted(learning * 2)
    updates, _ = _update(optimizer, params, state, params, {MAIN: 1.0, ENCODER: 1.0})
    assert not updates["encoder/b"].any()
    assert all(updates[name].all() for name in SHAPES if LABELS[name] != FROZEN)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: f"{model.name}-{model.variant}")
def test_moments_are_kept_for_what_learns_alone(model, trainable):
    config = TrainConfig(model=model, encoder=EncoderConfig(trainable=trainable))
    shapes = functional.shapes(model).params
    labels = label_parameters(shapes, freezing_rules(config))
    assert labels.keys() == shapes.keys()
    in_encoder = {name for name in shapes if name.startswith("encoder/")}
    expected = ENCODER if trainable else FROZEN
    assert {labels[name] for name in in_encoder} <= {expected}
    assert {labels[name] for name in shapes.keys() - in_encoder} == {MAIN}

    state = jax.eval_shape(create_optimizer(config.optimizer, labels).init, shapes)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert count == 2 * sum(a.size for name, a in shapes.items() if labels[name] != FROZEN)
    rates = initial_learning_rates(config)
    assert set(rates) == set(labels.values()) - {FROZEN}


@pytest.mark.parametrize(
    "name", ["encode/blocks/0/conv/kernel", "stage6/up/kernel", "head", "xhead/kernel", "down5/a/b"]
)
def test_a_name_without_a_rule_is_an_error(name):
    rules = freezing_rules(TrainConfig())
    with pytest.raises(InputError, match=f"parameter {name} matches no freezing rule"):
        label_parameters(["head/kernel", name], rules)


def test_a_name_with_two_rules_is_an_error():
    rules = ((r"encoder/.+", FROZEN), (r".+/kernel", MAIN))
    with pytest.raises(InputError, match="encoder/kernel matches more than one freezing rule"):
        label_parameters(["encoder/kernel"], rules)


def test_each_group_begins_with_its_own_rate():
    config = TrainConfig(encoder=EncoderConfig(trainable=True, learning_rate=1e-5))
    assert initial_learning_rates(config) == {MAIN: 3e-4, ENCODER: 1e-5}
    unet = dataclasses.replace(config, model=ModelConfig(name="unet"))
    assert initial_learning_rates(unet) == {MAIN: 3e-4}
