"""What tests run on."""

import os

import jax


def test_no_test_takes_a_gpu_that_nobody_asked_for():
    """By JAX's own default, the first test would take all memory of every GPU that is there."""
    asked_for = os.environ.get("JAX_PLATFORMS", "")
    assert asked_for and jax.config.values["jax_platforms"] == asked_for
