import math

import numpy as np
import pytest

from fetal_flax.data.phantoms.echo import speckle_envelope

RAYLEIGH_MEAN_TO_DEVIATION = math.sqrt(math.pi / (4.0 - math.pi))  # 1.913


def test_speckle_of_homogeneous_tissue_is_rayleigh():
    amplitude = np.full((700, 700), 3.0, np.float32)
    envelope = speckle_envelope(
        np.random.default_rng(0), amplitude, np.zeros_like(amplitude), 1.5, 3.0
    )[20:-20, 20:-20]
    assert envelope.mean() / envelope.std() == pytest.approx(RAYLEIGH_MEAN_TO_DEVIATION, rel=0.03)
    assert np.mean(envelope**2) == pytest.approx(9.0, rel=0.03)


def test_speckle_is_wider_than_deep():
    amplitude = np.ones((400, 400), np.float32)
    envelope = speckle_envelope(
        np.random.default_rng(0), amplitude, np.zeros_like(amplitude), 1.0, 4.0
    )
    centred = envelope - envelope.mean()
    lag = 4
    axial = np.mean(centred[lag:] * centred[:-lag])
    lateral = np.mean(centred[:, lag:] * centred[:, :-lag])
    assert lateral > 0.4 * centred.var()
    assert axial < 0.1 * centred.var()


def test_strong_reflector_stands_out_of_the_speckle():
    amplitude = np.full((200, 200), 0.01, np.float32)
    specular = np.zeros_like(amplitude)
    specular[90:110] = 1.0
    envelope = speckle_envelope(np.random.default_rng(0), amplitude, specular, 2.0, 4.0)
    np.testing.assert_allclose(envelope[100, 20:-20], 1.0, atol=0.05)
    assert envelope[:70].max() < 0.1
