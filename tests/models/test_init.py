import itertools
from typing import cast

import jax
import numpy as np
import pytest
from flax import nnx

from fetal_flax.models.init import HostRngs, he_normal_fan_out, torch_uniform


@pytest.mark.parametrize("traced", [False, True])
def test_torch_uniform_fills_its_interval_and_nothing_else(traced):
    draw = lambda key: torch_uniform(16)(key, (100, 100), np.float32)  # noqa: E731
    array = np.asarray((jax.jit(draw) if traced else draw)(jax.random.key(0)))
    assert array.dtype == np.float32
    assert (array.min(), array.max()) == pytest.approx((-0.25, 0.25), rel=1e-3)
    assert np.abs(array).max() <= 0.25
    assert (array.mean(), array.std()) == pytest.approx((0, 0.5 / 12**0.5), abs=0.005)


@pytest.mark.parametrize("traced", [False, True])
def test_he_normal_has_its_deviation(traced):
    draw = lambda key: he_normal_fan_out(8)(key, (100, 100), np.float32)  # noqa: E731
    array = np.asarray((jax.jit(draw) if traced else draw)(jax.random.key(0)))
    assert array.dtype == np.float32
    assert (array.mean(), array.std()) == pytest.approx((0, 0.5), abs=0.015)
    # Of a normal distribution, 4.55 % lie beyond two deviations.
    assert (np.abs(array) > 1).mean() == pytest.approx(0.0455, abs=0.01)


def test_a_key_goes_on_giving_the_same_numbers():
    """A training begins with them: other numbers would be another training."""
    key = jax.random.key(0)
    uniform, normal = torch_uniform(9)(key, (3,)), he_normal_fan_out(9)(key, (3,))
    np.testing.assert_array_equal(
        uniform, np.array([0.09130779, -0.15347552, -0.30601764], np.float32)
    )
    np.testing.assert_array_equal(
        normal, np.array([0.059269793, -0.06227483, 0.30189812], np.float32)
    )


def test_host_rngs_has_the_keys_of_flax():
    host, flax = HostRngs(3), nnx.Rngs(params=3)
    # More than it folds in at once.
    for _ in itertools.repeat(None, 300):
        np.testing.assert_array_equal(host.params(), jax.random.key_data(flax.params()))


def test_host_rngs_without_a_seed_draws_nothing():
    key = cast(jax.Array, HostRngs(None).params())
    assert not np.any(torch_uniform(9)(key, (3,)))
