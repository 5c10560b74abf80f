"""What tests run on."""

import os

import jax
import jaxtyping
import numpy as np
import pytest

from fetal_flax.measurement.overlap import segmentation_metrics


def test_no_test_takes_a_gpu_that_nobody_asked_for():
    """By JAX's own default, the first test would take all memory of every GPU that is there."""
    asked_for = os.environ.get("JAX_PLATFORMS", "")
    assert asked_for and jax.config.values["jax_platforms"] == asked_for


def test_shapes_that_annotations_give_are_checked():
    """Both masks are of one height and width."""
    mask = np.zeros((2, 3), bool)
    with pytest.raises(jaxtyping.TypeCheckError, match="'truth'"):
        segmentation_metrics(mask, mask.T)
