"""Which parameters learn, and how: Adam with L2 as torch does it, frozen ones left alone."""

import math
import re
from collections.abc import Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from fetal_flax._util.backend import target_backend
from fetal_flax.config import OptimizerConfig, TrainConfig
from fetal_flax.errors import InputError

MAIN, ENCODER, FROZEN = "main", "encoder", "frozen"
SMALL = 2**14
"""Numbers of an array that a GPU moves in less time than it takes to start a kernel."""


def freezing_rules(config: TrainConfig) -> tuple[tuple[str, str], ...]:
    """Returns anchored patterns of parameter names with the group each belongs to."""
    return (
        (r"encoder/.+", ENCODER if config.encoder.trainable else FROZEN),
        (r"(init_conv|aspp|bottleneck|down[1-4]|bottom|stage[1-5]|head)/.+", MAIN),
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
    separate = optax.chain(
        # torch.optim.Adam's weight_decay is L2: it enters the moments, unlike AdamW's.
        optax.add_decayed_weights(config.l2),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
    )

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if target_backend() == "cpu":
            return separate.update(updates, state, params)
        packing = _Packing(updates)
        empty, adam = cast(tuple[optax.OptState, optax.ScaleByAdamState], state)
        packed = adam._replace(mu=packing.pack(adam.mu), nu=packing.pack(adam.nu))
        directions, (empty, packed) = separate.update(
            packing.pack(updates), (empty, packed), packing.pack(params)
        )
        adam = packed._replace(mu=packing.unpack(packed.mu), nu=packing.unpack(packed.nu))
        return packing.unpack(directions), (empty, adam)

    return optax.GradientTransformation(separate.init, update)


class _Packing:
    """Small arrays of a tree as one vector: what is done to each is then one kernel of a GPU.

    Args:
        tree: Arrays of the shapes that are packed.
    """

    def __init__(self, tree: Any):
        leaves, self._structure = jax.tree.flatten(tree)
        self._shapes = [leaf.shape for leaf in leaves]
        self._small = [math.prod(shape) <= SMALL for shape in self._shapes]

    def pack(self, tree: Any) -> list[Array]:
        """Returns the vector, and behind it the arrays that are not small."""
        leaves = self._structure.flatten_up_to(tree)
        pairs = list(zip(leaves, self._small, strict=True))
        vector = [a.ravel() for a, small in pairs if small]
        large = [a for a, small in pairs if not small]
        return [jnp.concatenate(vector), *large] if vector else large

    def unpack(self, packed: list[Array]) -> Any:
        """Returns the tree that `pack` made this of."""
        arrays, start, leaves = iter(packed), 0, []
        vector = next(arrays) if any(self._small) else None
        for shape, small in zip(self._shapes, self._small, strict=True):
            if small and vector is not None:
                stop = start + math.prod(shape)
                leaves.append(vector[start:stop].reshape(shape))
                start = stop
            else:
                leaves.append(next(arrays))
        return self._structure.unflatten(leaves)


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
