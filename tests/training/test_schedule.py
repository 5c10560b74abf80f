import math
from collections.abc import Sequence

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from fetal_flax.config import ScheduleConfig
from fetal_flax.training.schedule import EarlyStopping, ReduceLROnPlateau, rate_factor

# Ties, negatives, and gains around the relative threshold of 1e-4.
METRICS = st.lists(
    st.one_of(
        st.sampled_from([0.0, 0.5, 0.5 * (1 + 1e-4), 0.50006, 0.50004, -0.5, 0.9, 0.90001]),
        st.floats(-1, 1),
    ),
    min_size=1,
    max_size=60,
)


def _torch_scheduler(rates: dict[str, float], config: ScheduleConfig):
    optimizer = torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates.values()]
    )
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode="max",
        factor=config.factor,
        patience=config.patience,
        threshold=config.threshold,
        threshold_mode="rel",
        min_lr=config.min_learning_rate,
    )
    return optimizer, scheduler


@hypothesis.given(
    metrics=METRICS,
    patience=st.integers(0, 4),
    factor=st.sampled_from([0.1, 0.5, 0.9]),
    min_learning_rate=st.sampled_from([0.0, 1e-6, 1e-4]),
    threshold=st.sampled_from([0.0, 1e-4, 0.1]),
)
@hypothesis.settings(deadline=None, derandomize=True, max_examples=200)
def test_plateau_is_torchs(metrics, patience, factor, min_learning_rate, threshold):
    config = ScheduleConfig(
        patience=patience,
        factor=factor,
        min_learning_rate=min_learning_rate,
        threshold=threshold,
    )
    rates, plateau = {"main": 3e-4, "encoder": 3e-5}, ReduceLROnPlateau()
    optimizer, scheduler = _torch_scheduler(rates, config)
    for metric in metrics:
        plateau, rates = plateau.update(metric, rates, config)
        scheduler.step(metric)
        assert list(rates.values()) == [group["lr"] for group in optimizer.param_groups]
        assert (plateau.best, plateau.bad_epochs) == (scheduler.best, scheduler.num_bad_epochs)


def test_plateau_reduces_when_bad_epochs_exceed_patience():
    config, plateau = ScheduleConfig(patience=2, factor=0.5), ReduceLROnPlateau()
    seen = []
    for metric in (0.5, 0.5, 0.5, 0.5, 0.5):
        plateau, rates = plateau.update(metric, {"main": 1.0}, config)
        seen.append(rates["main"])
    assert seen == [1, 1, 1, 0.5, 1]


def test_plateau_stops_at_the_lowest_rate():
    config, plateau, rates = ScheduleConfig(patience=0), ReduceLROnPlateau(best=1.0), {"main": 3e-4}
    for _ in range(20):
        plateau, rates = plateau.update(0.5, rates, config)
    assert rates == {"main": 1e-6}


def test_plateau_leaves_its_arguments_alone():
    config, plateau, rates = ScheduleConfig(patience=0), ReduceLROnPlateau(best=1.0), {"main": 3e-4}
    plateau.update(0.5, rates, config)
    assert (plateau, rates) == (ReduceLROnPlateau(best=1.0), {"main": 3e-4})


def _stopped_at(metrics: list[float], patience: int) -> int | None:
    config, stopping = ScheduleConfig(early_stopping_patience=patience), EarlyStopping()
    for epoch, metric in enumerate(metrics, 1):
        stopping = stopping.update(metric, epoch)
        if stopping.should_stop(config):
            return epoch
    return None


def test_early_stopping_stops_after_as_many_bad_epochs_as_its_patience():
    assert _stopped_at([0.1, 0.2, 0.2, 0.1, 0.15], patience=3) == 5


def test_early_stopping_counts_from_the_last_best():
    assert _stopped_at([0.1, 0.2, 0.1, 0.1, 0.3, 0.1, 0.1], patience=3) is None


def test_early_stopping_takes_any_gain_for_a_new_best_and_a_tie_for_none():
    assert _stopped_at([0.5, 0.5 + 1e-9, 0.5 + 2e-9], patience=1) is None
    assert _stopped_at([0.5, 0.5], patience=1) == 2


def test_early_stopping_never_stops_on_a_rise():
    assert _stopped_at([0.1 * i for i in range(50)], patience=1) is None


def test_early_stopping_remembers_the_best_epoch():
    stopping = EarlyStopping()
    for epoch, metric in enumerate([-0.3, 0.8, 0.7, 0.8], 1):
        stopping = stopping.update(metric, epoch)
    assert stopping == EarlyStopping(best=0.8, best_epoch=2, bad_epochs=2)


@pytest.mark.parametrize("state", [ReduceLROnPlateau(), EarlyStopping()])
def test_states_begin_below_every_metric(state):
    assert state.best == -math.inf


def factors(config: ScheduleConfig, steps: Sequence[int]) -> list[float]:
    """Returns the factor on the rates at these steps, of eight steps an epoch."""
    factor = rate_factor(config, 8)
    assert factor is not None
    return [np.asarray(factor(step)).item() for step in steps]


def test_a_cosine_falls_to_nothing_at_the_end():
    expected = [0.5 * (1 + math.cos(math.pi * step / 40)) for step in range(41)]
    ours = factors(ScheduleConfig(epochs=5, decay="cosine"), range(41))
    assert ours == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("decay", ["plateau", "cosine"])
def test_a_warm_up_rises_evenly_and_hands_over_at_the_peak(decay):
    config = ScheduleConfig(epochs=5, decay=decay, warmup_epochs=0.5)
    last = 1.0 if decay == "plateau" else 0.5 * (1 + math.cos(math.pi * 35 / 36))
    ours = factors(config, [*range(5), 39])
    assert ours == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, last], abs=1e-6)


def test_without_either_the_rates_are_left_alone():
    assert rate_factor(ScheduleConfig(), 8) is None


def test_no_patience_never_stops():
    stopping = EarlyStopping(best=1.0, bad_epochs=1000)
    assert not stopping.should_stop(ScheduleConfig(early_stopping_patience=None))
