"""Learning rates over the steps, and what validation decides: lower rates, a new best, the end.

What is decided once per epoch on the host is a small immutable state, stored in every checkpoint.
"""

import dataclasses
import math
from collections.abc import Mapping

import optax

from fetal_flax.config import ScheduleConfig


def rate_factor(config: ScheduleConfig, steps_per_epoch: int) -> optax.Schedule | None:
    """Returns the factor on all learning rates as a function of the step, or None where it is 1.

    Args:
        config: Warm-up and decay. A plateau's reductions are not part of it: no step knows them.
        steps_per_epoch: Training steps in an epoch.
    """
    total = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if config.decay == "cosine":
        after = optax.cosine_decay_schedule(1.0, max(total - warmup, 1))
    elif warmup:
        after = optax.constant_schedule(1.0)
    else:
        return None
    # The first step of a warm-up has the rate of its end: with 0 it would do nothing.
    rising = optax.linear_schedule(1 / (warmup + 1), 1.0, warmup)
    return optax.join_schedules([rising, after], [warmup]) if warmup else after


@dataclasses.dataclass(frozen=True)
class ReduceLROnPlateau:
    """State of `torch.optim.lr_scheduler.ReduceLROnPlateau` in mode "max", threshold "rel".

    Attributes:
        best: Highest metric that beat its predecessor by the threshold.
        bad_epochs: Epochs since.

    Example:
        >>> plateau, rates = ff.schedules.ReduceLROnPlateau(), {"main": 1e-3}
        >>> settings = ff.config.ScheduleConfig(patience=1, factor=0.5)
        >>> for dice in (0.9, 0.8, 0.8):
        ...     plateau, rates = plateau.update(dice, rates, settings)
        >>> rates
        {'main': 0.0005}
    """

    best: float = -math.inf
    bad_epochs: int = 0

    def update(
        self, metric: float, rates: Mapping[str, float], config: ScheduleConfig
    ) -> tuple["ReduceLROnPlateau", dict[str, float]]:
        """Takes an epoch's metric; returns the next state and the learning rates to go on with."""
        if metric > self.best * (1 + config.threshold):
            return ReduceLROnPlateau(best=metric), dict(rates)
        if self.bad_epochs + 1 <= config.patience:
            return ReduceLROnPlateau(self.best, self.bad_epochs + 1), dict(rates)
        return ReduceLROnPlateau(self.best), {
            group: _reduced(rate, config) for group, rate in rates.items()
        }


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """Stops after `early_stopping_patience` epochs in a row without a new best metric.

    Attributes:
        best: Highest metric so far.
        best_epoch: Its epoch, counted from 1; 0 before the first.
        bad_epochs: Epochs since.
    """

    best: float = -math.inf
    best_epoch: int = 0
    bad_epochs: int = 0

    def update(self, metric: float, epoch: int) -> "EarlyStopping":
        """Takes the metric of `epoch`; returns the next state."""
        if metric > self.best:
            return EarlyStopping(metric, epoch)
        return EarlyStopping(self.best, self.best_epoch, self.bad_epochs + 1)

    def should_stop(self, config: ScheduleConfig) -> bool:
        """Returns whether patience has run out."""
        patience = config.early_stopping_patience
        return patience is not None and self.bad_epochs >= patience


def _reduced(rate: float, config: ScheduleConfig) -> float:
    lower = max(rate * config.factor, config.min_learning_rate)
    # torch's `eps`: a change too small to matter is not made.
    return lower if rate - lower > 1e-8 else rate
