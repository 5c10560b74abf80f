"""What a start compiles ahead of its first step."""

import jax
import pytest

from fetal_flax.errors import InputError
from fetal_flax.models import functional
from fetal_flax.training.compile import BackgroundCompilation
from fetal_flax.training.run import train
from fetal_flax.training.setup import prepare


def test_a_run_traces_its_training_step_once_and_ahead_of_time(small_config, tmp_path, monkeypatch):
    apply_train, traced = functional.apply_train, []

    def counted(*arguments, **keywords):
        traced.append(None)
        return apply_train(*arguments, **keywords)

    monkeypatch.setattr(functional, "apply_train", counted)
    setup = prepare(small_config())
    assert isinstance(setup.compiled_chunk.compiled, jax.stages.Compiled)
    assert setup.compiled_chunk.seconds > 0
    assert len(traced) == 1
    train(small_config(epochs=1), tmp_path / "run")
    assert len(traced) == 2


def test_what_is_wrong_with_a_step_is_said_where_it_is_called():
    def refuse() -> jax.stages.Compiled:
        raise InputError("images don't fit")

    step = BackgroundCompilation(refuse)
    with pytest.raises(InputError, match="don't fit"):
        step()
