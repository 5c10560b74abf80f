"""How an epoch's batches come to the devices."""

import dataclasses
import threading

import pytest

from fetal_flax.training import epoch
from fetal_flax.training.epoch import open_batches
from fetal_flax.training.setup import prepare


@pytest.mark.usefixtures("tiny_network", "never_trained")
def test_recipes_are_made_by_a_thread_while_the_devices_work(small_config, monkeypatch):
    config, recipes, made_by = small_config(), epoch.training_recipes, []

    def noted(*arguments):
        for recipe in recipes(*arguments):
            made_by.append(threading.current_thread())
            yield recipe

    monkeypatch.setattr(epoch, "training_recipes", noted)
    data = dataclasses.replace(config.data, backend="device", steps_per_dispatch=4)
    run = prepare(dataclasses.replace(config, data=data))
    with open_batches(run, start_step=0, total_steps=5 * run.steps_per_epoch) as batches:
        assert len(list(batches)) == 5
    assert len(made_by) == 5 and threading.current_thread() not in made_by
