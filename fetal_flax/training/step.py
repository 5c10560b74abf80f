"""One training step, several in a call, and one validation step, as pure functions.

`train_step` is what a run does, once per batch; `train_chunk` repeats it, and `compile.py` jits
them over a mesh of devices. The batch may be sharded: sums over it, those of batch norm among them,
are global then, and XLA inserts the collectives.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array

from fetal_flax._util.backend import target_backend
from fetal_flax.config import TrainConfig
from fetal_flax.data.batch import Batch, BatchRecipe, DeviceDataset, gather_batch
from fetal_flax.data.photometric import apply_photometric
from fetal_flax.models import functional
from fetal_flax.models.functional import Arrays, Variables
from fetal_flax.models.interface import EncoderFeatures
from fetal_flax.training.losses import dice_bce, hard_dice
from fetal_flax.training.optimizer import (
    FROZEN,
    create_optimizer,
    initial_learning_rates,
    parameter_labels,
)
from fetal_flax.training.packing import Vectors, pack, unpack
from fetal_flax.training.schedule import rate_factor

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


class LossAndGradients(NamedTuple):
    """What a training step computes before it changes anything."""

    loss: Array
    gradients: Arrays
    """Of the parameters that learn."""
    batch_stats: Arrays
    """After the batch."""
    logits: Array


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    config: TrainConfig,
    pos_weight: float | Array,
    steps_per_epoch: int = 1,
    folded_encoder: Arrays | None = None,
    vectors: Vectors | None = None,
) -> tuple[TrainState, Metrics]:
    """Trains on one batch.

    Args:
        state: Before the step.
        batch: Its images.
        config: The run.
        pos_weight: Factor on the cross-entropy of foreground pixels.
        steps_per_epoch: What warm-up and cosine count epochs by.
        folded_encoder: What `fold_static_encoder` returned of the state, or of one before it.
        vectors: What stands in the state, and in the next one, for its small arrays
            (packing.py); None where nothing is packed.

    Returns:
        The next state; `loss` and `dice` of the batch, and whether the step was `applied`: one
        whose loss or gradients are not finite is not (`schedule.non_finite`).
    """
    vectors = vectors or {}
    loss, gradients, batch_stats, logits = loss_and_gradients(
        unpack(state, vectors),
        batch,
        config=config,
        pos_weight=pos_weight,
        folded_encoder=folded_encoder,
    )
    gradients, batch_stats = pack((gradients, batch_stats), vectors)
    params, opt_state = _update(state, gradients, config, steps_per_epoch)
    averages = _move_averages(state, params | batch_stats, config)
    after = state._replace(
        params=params, batch_stats=batch_stats, opt_state=opt_state, averages=averages
    )
    applied = all_finite((loss, gradients)) & ~state.halted
    after = jax.tree.map(lambda new, old: jnp.where(applied, new, old), after, state)
    skip = config.schedule.non_finite == "skip"
    after = after._replace(
        # Frozen arrays pass by untouched, so that they are not even copied.
        params={n: a if n in gradients else state.params[n] for n, a in after.params.items()},
        step=state.step + jnp.where(skip | applied, 1, 0),
        halted=state.halted if skip else ~applied,
    )
    dice = hard_dice(logits, _hard_masks(batch, config).astype(logits.dtype)).mean()
    return after, {"loss": loss, "dice": dice, "applied": applied}


def loss_and_gradients(
    state: TrainState,
    batch: Batch,
    *,
    config: TrainConfig,
    pos_weight: float | Array,
    folded_encoder: Arrays | None = None,
) -> LossAndGradients:
    """Runs the network forward and back; the arguments are those of `train_step`."""
    labels = parameter_labels(config, state.params)
    frozen = {name: a for name, a in state.params.items() if labels[name] == FROZEN}
    learning = {name: a for name, a in state.params.items() if labels[name] != FROZEN}
    dtype = _dtype(state.params)
    images, masks = _images(batch, dtype), jnp.asarray(batch.mask, dtype)
    if config.data.soft_masks:
        masks = masks / 255
    if batch.photometric is not None:
        images = apply_photometric(images, batch.photometric, config.augmentation)

    def loss_function(learning: Arrays) -> tuple[Array, tuple[Arrays, Array]]:
        logits, batch_stats = functional.apply_train(
            config.model,
            Variables(learning | frozen, state.batch_stats),
            images,
            dropout_key=jax.random.fold_in(jax.random.key(config.seed), state.step),
            train_encoder=not encoder_is_static(config),
            folded_encoder=folded_encoder,
        )
        loss = dice_bce(
            logits, masks, jnp.asarray(batch.valid), config=config.loss, pos_weight=pos_weight
        )
        return loss, (batch_stats, logits)

    # Differentiating by what learns alone leaves no gradient through a frozen encoder.
    (loss, (batch_stats, logits)), gradients = jax.value_and_grad(loss_function, has_aux=True)(
        learning
    )
    return LossAndGradients(loss, gradients, batch_stats, logits)


def train_chunk(
    state: TrainState,
    pos_weight: float | Array,
    dataset: DeviceDataset | None,
    items: Batch | BatchRecipe,
    *,
    config: TrainConfig,
    batch_sharding: jax.sharding.Sharding,
    steps_per_epoch: int = 1,
) -> tuple[TrainState, Metrics]:
    """Trains on several batches, one step after the other in one call.

    Args:
        state: Before the first step.
        pos_weight: As in `train_step`.
        dataset: The images on the devices; None where the host makes the batches.
        items: The steps' batches, or recipes of them, behind a leading axis of steps.
        config: The run.
        batch_sharding: How the devices share a batch that is made of a recipe.
        steps_per_epoch: As in `train_step`.

    Returns:
        The state after the last step, and each step's metrics.
    """
    # Not in every step anew: on a GPU that is a kernel or two for each of its arrays.
    encoder = fold_static_encoder(config, state)
    vectors = small_arrays(config, state)

    def step(state: TrainState, item: Any) -> tuple[TrainState, Metrics]:
        state = state._replace(params=_aspp_in_axes_order(state.params))
        batch = item
        if dataset is not None:
            batch = gather_batch(
                dataset, item, config.model.in_channels, soft_masks=config.data.soft_masks
            )
            batch = jax.lax.with_sharding_constraint(batch, batch_sharding)
        return train_step(
            state,
            batch,
            config=config,
            pos_weight=pos_weight,
            steps_per_epoch=steps_per_epoch,
            folded_encoder=encoder,
            vectors=vectors,
        )

    packed, metrics = jax.lax.scan(step, pack(state, vectors), items)
    return unpack(packed, vectors), metrics


def validation_step(
    variables: Variables,
    batch: Batch,
    features: EncoderFeatures | None,
    *,
    config: TrainConfig,
    pos_weight: float | Array,
) -> Metrics:
    """Measures a network on one batch.

    Args:
        variables: The network.
        batch: Its images; rows that are not `valid` count in no number.
        features: What `encode_step` made of the images, or None.
        config: The run.
        pos_weight: As in `train_step`.

    Returns:
        `loss` over the valid images, `dice` of each image and which are `valid`; with
        `schedule.select_by` ellipse_dice also the masks, `predicted` and `annotated`.
    """
    dtype = _dtype(variables.params)
    images, masks = _images(batch, dtype), _hard_masks(batch, config).astype(dtype)
    valid = jnp.asarray(batch.valid)
    logits = functional.apply(config.model, variables, images, features=features)
    loss = dice_bce(logits, masks, valid, config=config.loss, pos_weight=pos_weight)
    metrics = {"loss": loss, "dice": hard_dice(logits, masks), "valid": valid}
    if config.schedule.select_by == "ellipse_dice":
        metrics |= {"predicted": logits[..., 0] > 0, "annotated": masks[..., 0] > 0}
    return metrics


def encode_step(variables: Variables, batch: Batch, *, config: TrainConfig) -> EncoderFeatures:
    """Returns the features that a network's encoder finds in a batch's images."""
    return functional.encode(config.model, variables, _images(batch, _dtype(variables.params)))


def initial_state(config: TrainConfig, variables: Variables) -> TrainState:
    """Returns the state before the first step; a pure function."""
    labels = parameter_labels(config, variables.params)
    averages = {}
    if config.schedule.average_decay:
        learning = {name: a for name, a in variables.params.items() if labels[name] != FROZEN}
        averages = learning | variables.batch_stats
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables.params,
        batch_stats=variables.batch_stats,
        opt_state=create_optimizer(config.optimizer, labels).init(variables.params),
        learning_rates={
            group: jnp.asarray(rate, _dtype(variables.params))
            for group, rate in initial_learning_rates(config).items()
        },
        averages=averages,
        halted=jnp.zeros((), bool),
    )
    # Copied, because the state is donated and the caller may keep the variables.
    return jax.tree.map(jnp.copy, state)


def network_of(state: TrainState) -> Variables:
    """Returns the network that a state is validated and kept by: averaged, where it averages."""
    return Variables(
        *(
            {name: state.averages.get(name, array) for name, array in arrays.items()}
            for arrays in (state.params, state.batch_stats)
        )
    )


def encoder_is_static(config: TrainConfig) -> bool:
    """Returns whether the encoder's parameters and batch statistics stay as they are."""
    return not config.encoder.trainable and config.encoder.frozen_batch_norm != "batch"


def fold_static_encoder(config: TrainConfig, state: TrainState) -> Arrays | None:
    """Returns what the encoder is folded to in every step of a run; None where it is not static."""
    if config.model.name == "unet" or not encoder_is_static(config):
        return None
    return functional.fold_encoder(config.model, Variables(state.params, state.batch_stats))


def small_arrays(config: TrainConfig, state: TrainState) -> Vectors:
    """Returns what `train_chunk` packs of a state: all but the kernels of convolutions.

    A vector is named after the learning rate of its parameters, or after the batch statistics. On
    a CPU, kernels cost nothing by their number, and nothing is packed.
    """
    if target_backend() == "cpu":
        return {}
    groups = parameter_labels(config, state.params) | {
        name: "batch_stats"
        for name in state.batch_stats
        if not (name.startswith(functional.ENCODER) and encoder_is_static(config))
    }
    vectors: Vectors = {}
    for name, array in (state.params | state.batch_stats).items():
        if array.ndim <= 2 and groups.get(name, FROZEN) != FROZEN:
            vectors.setdefault(f"{groups[name]}/packed", {})[name] = array.shape
    return vectors


def _aspp_in_axes_order(params: Arrays) -> Arrays:
    """Returns the parameters with the ASPP's kernels in row-major order, on a GPU.

    Their gradients come so. A frozen encoder's features need none, and XLA would keep the kernels
    as the forward pass alone reads them, and copy each and its moments in every step.
    """
    if target_backend() == "cpu":
        return params
    kernels = {n: a for n, a in params.items() if n.startswith("aspp/") and a.ndim == 4}
    row_major = Layout((0, 1, 2, 3))
    return params | {n: with_layout_constraint(a, row_major) for n, a in kernels.items()}


def all_finite(arrays: tuple[Array, Arrays]) -> Array:
    """Returns whether loss and gradients are finite, all of them."""
    leaves = jax.tree.leaves(arrays)
    if target_backend() == "cpu":
        # Stacked: a chain of ands XLA repeats, in a loop, in the update of every parameter.
        return jnp.isfinite(jnp.stack([jnp.abs(a).max() for a in leaves])).all()
    # For a GPU, copying the answers together is less than the kernel or two for each of them that
    # XLA makes without the barrier. 3×3 gradients, as cuDNN leaves them, have the outputs first.
    in_memory = [jnp.moveaxis(a, -1, 0) if a.shape[:2] == (3, 3) else a for a in leaves]
    finite = jnp.concatenate([jnp.isfinite(a).ravel() for a in in_memory])
    return jax.lax.optimization_barrier(finite).all()


def _update(
    state: TrainState, gradients: Arrays, config: TrainConfig, steps_per_epoch: int
) -> tuple[Arrays, optax.OptState]:
    """Returns all parameters and the optimizer's state after a step by these gradients."""
    optimizer = create_optimizer(config.optimizer, parameter_labels(config, state.params))
    rates, factor = state.learning_rates, rate_factor(config.schedule, steps_per_epoch)
    # optax mixes dtypes; our own arithmetic stays strict.
    with jax.numpy_dtype_promotion("standard"):
        if factor is not None:
            now = jnp.asarray(factor(state.step), _dtype(state.params))
            rates = {group: rate * now for group, rate in rates.items()}
        still = {n: jnp.zeros_like(a) for n, a in state.params.items() if n not in gradients}
        updates, opt_state = optimizer.update(
            gradients | still, state.opt_state, state.params, learning_rates=rates
        )
    updates = cast(Arrays, updates)
    # Adding a zero update to a frozen array would turn -0.0 into 0.0.
    learned = {name: state.params[name] + updates[name] for name in gradients}
    return state.params | learned, opt_state


def _move_averages(state: TrainState, now: Arrays, config: TrainConfig) -> Arrays:
    """Returns the moving averages after a step that led to `now`."""
    # The first steps' weights would otherwise be in the average for as long as its decay says.
    step = state.step.astype(_dtype(state.params))
    decay = jnp.minimum(config.schedule.average_decay, (1 + step) / (10 + step))
    return {
        name: decay * average + (1 - decay) * now[name] for name, average in state.averages.items()
    }


def _images(batch: Batch, dtype: jnp.dtype) -> Array:
    """Returns a batch's images in [0, 1]."""
    return jnp.asarray(batch.image, dtype) / 255


def _hard_masks(batch: Batch, config: TrainConfig) -> Array:
    return jnp.asarray(batch.mask) > (_HALF if config.data.soft_masks else 0)


def _dtype(params: Arrays) -> jnp.dtype:
    """Returns the parameters' dtype: float32, or float64 where parity is checked."""
    return next(iter(params.values())).dtype
