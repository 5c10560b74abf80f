"""Which parameters learn, and how: Adam with L2 as torch does it, frozen ones left alone."""

import re
from collections.abc import Iterable
from typing import Any

import jax
import optax

from fetal_flax.config import OptimizerConfig, TrainConfig
from fetal_flax.errors import InputError

MAIN, ENCODER, FROZEN = "main", "encoder", "frozen"


def freezing_rules(config: TrainConfig) -> tuple[tuple[str, str], ...]:
    """Returns anchored patterns of parameter names with the group each belongs to.

    A vector of packed parameters (packing.py) bears its group's name in front.
    """
    return (
        (r"encoder/.+", ENCODER if config.encoder.trainable else FROZEN),
        (r"(init_conv|aspp|bottleneck|down[1-4]|bottom|stage[1-5]|head)/.+", MAIN),
        (rf"{MAIN}/.+", MAIN),
    )


def label_parameters(names: Iterable[str], rules: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Returns the group of every parameter.

    Raises:
        InputError: A name matches no rule, or rules of two groups; a renamed module must not
            thaw, or freeze, in silence.
    """
    labels = {}
    for name in names:
        groups = {group for pattern, group in rules if re.fullmatch(pattern, name)}
        if len(groups) != 1:
            raise InputError(
                f"parameter {name} matches {'no' if not groups else 'more than one'} freezing "
                "rule: amend freezing_rules in fetal_flax/training/optimizer.py"
            )
        labels[name] = groups.pop()
    return labels


def parameter_labels(config: TrainConfig, names: Iterable[str]) -> dict[str, str]:
    """Returns the group of every parameter of a run."""
    return label_parameters(names, freezing_rules(config))


def create_optimizer(
    config: OptimizerConfig, labels: dict[str, str]
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer; its `update` takes `learning_rates`, a rate per learning group.

    The rates are arguments, not constants, so that a plateau changes them without a new trace.
    Frozen parameters get no moments.
    """
    learning = scale_by_adam_l2(config)
    transforms = {
        group: optax.chain(learning, _scale_by_rate_of(group)) for group in (MAIN, ENCODER)
    }
    return optax.multi_transform({**transforms, FROZEN: optax.set_to_zero()}, labels)


def adam_l2(
    learning_rate: optax.ScalarOrSchedule, config: OptimizerConfig | None = None
) -> optax.GradientTransformation:
    """Returns the Adam with L2 of `torch.optim.Adam`, for a training loop of one's own.

    Args:
        learning_rate: A number, or a schedule of optax; the config's is not read.
        config: L2, betas and epsilon; None takes the defaults.

    Example:
        >>> optimizer = ff.optimizers.adam_l2(1e-3)
        >>> params = {"kernel": jnp.ones(3)}
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> jnp.round(updates["kernel"], 5)
        Array([-0.001, -0.001, -0.001], dtype=float32)
    """
    scale = scale_by_adam_l2(config or OptimizerConfig())
    return optax.chain(scale, optax.scale_by_learning_rate(learning_rate))


def scale_by_adam_l2(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns `adam_l2` without its learning rate."""
    return optax.chain(
        # torch.optim.Adam's weight_decay is L2: it enters the moments, unlike AdamW's.
        optax.add_decayed_weights(config.l2),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
    )


def initial_learning_rates(config: TrainConfig) -> dict[str, float]:
    """Returns the learning rate of each group that learns."""
    rates = {MAIN: config.optimizer.learning_rate}
    if config.encoder.trainable and config.model.name != "unet":
        rates[ENCODER] = config.encoder.learning_rate
    return rates


def _scale_by_rate_of(group: str) -> optax.GradientTransformationExtraArgs:
    def update(
        updates: optax.Updates, state: optax.OptState, params: Any = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        # A group without parameters has no rate, and nothing to scale.
        rate = extra["learning_rates"].get(group)
        return jax.tree.map(lambda direction: -rate * direction, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
