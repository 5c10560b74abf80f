"""One training step and one validation step, as pure functions under `jax.jit`.

State and shardings are declared, the training state is donated, and each step is traced once per
run. There is no `pmap` (legacy in today's JAX): the batch is sharded over a mesh, the rest is
replicated, and XLA inserts the collectives. Batch norm is global for the same reason.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from fetal_flax.config import TrainConfig
from fetal_flax.data.photometric import apply_photometric
from fetal_flax.data.pipeline import Batch
from fetal_flax.data.resident import Plan, Resident, take_batch
from fetal_flax.models import functional
from fetal_flax.models.convolution import compiler_options
from fetal_flax.models.functional import Arrays, Variables
from fetal_flax.models.unet import Maps
from fetal_flax.training import losses
from fetal_flax.training.optimizer import (
    FROZEN,
    create_optimizer,
    freezing_rules,
    initial_learning_rates,
    label_parameters,
)
from fetal_flax.training.schedule import rate_factor
from fetal_flax.training.sharding import batch_sharding, plan_sharding, replicate, replicated

Metrics = dict[str, Array]
_HALF = 127
"""A pixel of a soft mask is in the head above it."""


class TrainState(NamedTuple):
    """All that a step reads and replaces."""

    step: Array
    params: Arrays
    batch_stats: Arrays
    opt_state: optax.OptState
    learning_rates: Arrays
    """Of each group, before `schedule.decay` cosine and warm-up."""
    averages: Arrays
    """Moving averages of the parameters that learn and of all batch statistics, by name; empty
    without `schedule.average_decay`."""
    halted: Array
    """Whether a step before had a loss or gradients that are not finite, and the run shall stop:
    then no step changes anything, until the host has noticed."""


class Backward(NamedTuple):
    """What a training step computes before it changes anything."""

    loss: Array
    gradients: Arrays
    """Of the parameters that learn."""
    batch_stats: Arrays
    """After the batch."""
    logits: Array


class Steps(NamedTuple):
    """The jitted functions of a run."""

    train: jax.stages.Wrapped
    """(TrainState, pos_weight, Batch) → (TrainState, Metrics)."""
    evaluate: jax.stages.Wrapped
    """(Variables, pos_weight, Batch, Maps of the batch or None) → Metrics."""
    encode: jax.stages.Wrapped
    """(Variables, Batch) → Maps of a network with an encoder."""
    train_several: jax.stages.Wrapped
    """(TrainState, pos_weight, Batch) → (TrainState, Metrics): steps one after the other in one
    call; the batch and the metrics have a leading axis of steps."""
    train_resident: jax.stages.Wrapped
    """(TrainState, pos_weight, Resident, Plan) → (TrainState, Metrics): the same, with the batches
    of a plan."""
    take: jax.stages.Wrapped
    """(Resident, Plan) → Batch of the plan's only step."""


def create_state(config: TrainConfig, variables: Variables, mesh: Mesh) -> TrainState:
    """Returns the state before the first step, on every device of the mesh."""
    # In one program: by themselves, the moments' zeros are one for each shape.
    create = jax.jit(functools.partial(initial_state, config), out_shardings=replicated(mesh))
    return create(replicate(variables, mesh))


def initial_state(config: TrainConfig, variables: Variables) -> TrainState:
    """Returns the state before the first step; a pure function."""
    labels = label_parameters(variables.params, freezing_rules(config))
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables.params,
        batch_stats=variables.batch_stats,
        opt_state=create_optimizer(config.optimizer, labels).init(variables.params),
        learning_rates={
            group: jnp.asarray(rate, _dtype(variables.params))
            for group, rate in initial_learning_rates(config).items()
        },
        averages=_averaged(config, labels, variables),
        halted=jnp.zeros((), bool),
    )
    # Copied, because the state is donated and the caller may keep the variables.
    return jax.tree.map(jnp.copy, state)


def network_of(state: TrainState) -> Variables:
    """Returns the network that a state is validated and kept by: averaged, where it averages."""
    averages = state.averages
    return Variables(
        *(
            {name: averages.get(name, array) for name, array in arrays.items()}
            for arrays in (state.params, state.batch_stats)
        )
    )


def create_steps(config: TrainConfig, mesh: Mesh, *, steps_per_epoch: int = 1) -> Steps:
    """Returns the run's training and validation steps.

    Their `pos_weight`, the factor on the cross-entropy of foreground pixels, is an argument: a
    step can be compiled before the data tell it, and for any data.

    Args:
        config: The run.
        mesh: Devices that share the batch.
        steps_per_epoch: What warm-up and cosine count epochs by.

    Returns:
        `train(state, pos_weight, batch)`, which consumes the state and returns the next one with
        `loss` and `dice` of the batch and whether it was `applied`, and `evaluate(variables,
        pos_weight, batch, maps)`, which returns the `loss` over the valid images, `dice` per image
        and which are `valid`, from the `maps` that `encode(variables, batch)` returns, if given;
        and what trains several steps in a call, or on images that are on the devices. A step whose
        loss or gradients are not finite is not applied (`schedule.non_finite`).
    """
    skip = config.schedule.non_finite == "skip"
    labels = _labels(config)
    optimizer = create_optimizer(config.optimizer, labels)
    backward = create_backward(config)
    factor = rate_factor(config.schedule, steps_per_epoch)

    def rates(state: TrainState) -> Arrays:
        if factor is None:
            return state.learning_rates
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes.
            now = jnp.asarray(factor(state.step), _dtype(state.params))
        return {group: rate * now for group, rate in state.learning_rates.items()}

    def averages(state: TrainState, learned: Arrays) -> Arrays:
        # The first steps' weights would otherwise be in the average for as long as its decay says.
        step = state.step.astype(_dtype(state.params))
        decay = jnp.minimum(config.schedule.average_decay, (1 + step) / (10 + step))
        return {
            name: decay * average + (1 - decay) * learned[name]
            for name, average in state.averages.items()
        }

    def train(
        state: TrainState, pos_weight: float | Array, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        loss, gradients, batch_stats, logits = backward(state, pos_weight, batch)
        frozen = {name: a for name, a in state.params.items() if name not in gradients}
        # optax raises float decays to integer counts; our own arithmetic stays strict.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(
                gradients | {name: jnp.zeros_like(array) for name, array in frozen.items()},
                state.opt_state,
                state.params,
                learning_rates=rates(state),
            )
        # Frozen arrays pass by untouched: adding a zero update would turn -0.0 into 0.0.
        updates = cast(Arrays, updates)
        learning = {name: state.params[name] + updates[name] for name in gradients}
        # Stacked: a chain of ands XLA repeats, in a loop, in the update of every parameter.
        largest = [jnp.abs(a).max() for a in jax.tree.leaves((loss, gradients))]
        finite = jnp.isfinite(jnp.stack(largest)).all()
        applied = finite & ~state.halted
        averaged = averages(state, learning | batch_stats)
        before = {name: state.params[name] for name in learning}
        learning, batch_stats, opt_state, averaged = jax.tree.map(
            lambda after, before: jnp.where(applied, after, before),
            (learning, batch_stats, opt_state, averaged),
            (before, state.batch_stats, state.opt_state, state.averages),
        )
        next_state = TrainState(
            state.step + jnp.where(skip | applied, 1, 0),
            learning | frozen,
            batch_stats,
            opt_state,
            state.learning_rates,
            averaged,
            state.halted if skip else ~applied,
        )
        dice = losses.hard_dice(logits, hard_masks(batch).astype(logits.dtype))
        return next_state, {"loss": loss, "dice": dice.mean(), "applied": applied}

    def hard_masks(batch: Batch) -> Array:
        return jnp.asarray(batch.mask) > (_HALF if config.data.soft_masks else 0)

    def encode(variables: Variables, batch: Batch) -> Maps:
        images = _images(batch, _dtype(variables.params))
        return functional.encode(config.model, variables, images)

    def evaluate(
        variables: Variables, pos_weight: float | Array, batch: Batch, maps: Maps | None
    ) -> Metrics:
        dtype = _dtype(variables.params)
        images, masks = _images(batch, dtype), hard_masks(batch).astype(dtype)
        valid = jnp.asarray(batch.valid)
        logits, _ = functional.apply(config.model, variables, images, maps=maps)
        loss = losses.dice_bce_loss(logits, masks, valid, config=config.loss, pos_weight=pos_weight)
        metrics = {"loss": loss, "dice": losses.hard_dice(logits, masks), "valid": valid}
        if config.schedule.select_by == "ellipse_dice":
            metrics |= {"predicted": logits[..., 0] > 0, "annotated": masks[..., 0] > 0}
        return metrics

    whole, split, planned = replicated(mesh), batch_sharding(mesh), plan_sharding(mesh)

    def batch_of(resident: Resident, step: Plan) -> Batch:
        batch = take_batch(
            resident, step, config.model.in_channels, soft_masks=config.data.soft_masks
        )
        return jax.lax.with_sharding_constraint(batch, split)

    def train_several(
        state: TrainState, pos_weight: float | Array, batches: Batch
    ) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda state, batch: train(state, pos_weight, batch), state, batches)

    def train_resident(
        state: TrainState, pos_weight: float | Array, resident: Resident, plan: Plan
    ) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(
            lambda state, step: train(state, pos_weight, batch_of(resident, step)), state, plan
        )

    def take(resident: Resident, plan: Plan) -> Batch:
        return batch_of(resident, jax.tree.map(lambda array: array[0], plan))

    options = compiler_options(deterministic=config.deterministic)
    jit = functools.partial(jax.jit, compiler_options=options)
    trained = {"out_shardings": (whole, whole), "donate_argnums": 0}
    return Steps(
        jit(train, in_shardings=(whole, whole, split), **trained),
        jit(evaluate, in_shardings=(whole, whole, split, split), out_shardings=whole),
        jit(encode, in_shardings=(whole, split), out_shardings=split),
        jit(train_several, in_shardings=(whole, whole, planned), **trained),
        jit(train_resident, in_shardings=(whole, whole, whole, planned), **trained),
        jit(take, in_shardings=(whole, planned), out_shardings=split),
    )


def create_backward(config: TrainConfig) -> Callable[[TrainState, float | Array, Batch], Backward]:
    """Returns a step's forward and backward pass, without the update."""
    labels = _labels(config)
    train_encoder = not encoder_rests(config)
    dropout_key = jax.random.key(config.seed)

    def backward(state: TrainState, pos_weight: float | Array, batch: Batch) -> Backward:
        frozen = {name: a for name, a in state.params.items() if labels[name] == FROZEN}
        learning = {name: a for name, a in state.params.items() if labels[name] != FROZEN}
        dtype = _dtype(state.params)
        images, valid = _images(batch, dtype), jnp.asarray(batch.valid)
        masks = jnp.asarray(batch.mask, dtype)
        if config.data.soft_masks:
            masks = masks / 255
        if batch.photometric is not None:
            images = apply_photometric(images, batch.photometric, config.augmentation)

        def loss_function(learning: Arrays) -> tuple[Array, tuple[Arrays, Array]]:
            logits, batch_stats = functional.apply(
                config.model,
                Variables(learning | frozen, state.batch_stats),
                images,
                train=True,
                train_encoder=train_encoder,
                dropout_key=jax.random.fold_in(dropout_key, state.step),
            )
            loss = losses.dice_bce_loss(
                logits, masks, valid, config=config.loss, pos_weight=pos_weight
            )
            return loss, (batch_stats, logits)

        # Differentiating by what learns alone leaves no gradient through a frozen encoder.
        (loss, (batch_stats, logits)), gradients = jax.value_and_grad(loss_function, has_aux=True)(
            learning
        )
        return Backward(loss, gradients, batch_stats, logits)

    return backward


def encoder_rests(config: TrainConfig) -> bool:
    """Returns whether the encoder's parameters and batch statistics stay as they are."""
    return not config.encoder.trainable and config.encoder.frozen_batch_norm != "batch"


def _labels(config: TrainConfig) -> dict[str, str]:
    return label_parameters(functional.shapes(config.model).params, freezing_rules(config))


def _averaged(config: TrainConfig, labels: dict[str, str], variables: Variables) -> Arrays:
    """Returns what the moving averages begin with."""
    if not config.schedule.average_decay:
        return {}
    params = {name: a for name, a in variables.params.items() if labels[name] != FROZEN}
    return params | variables.batch_stats


def _images(batch: Batch, dtype: jnp.dtype) -> Array:
    """Returns a batch's images in [0, 1]."""
    return jnp.asarray(batch.image, dtype) / 255


def _dtype(params: Arrays) -> jnp.dtype:
    """Returns the parameters' dtype: float32, or float64 where parity is checked."""
    return next(iter(params.values())).dtype
