import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from fetal_flax.config import LossConfig
from fetal_flax.training.losses import bce_with_logits, dice_bce, hard_dice, soft_dice

IMAGE, BATCH = LossConfig(), LossConfig(dice_over="batch")
SHAPE = (3, 5, 4, 1)


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _random_maps() -> tuple[np.ndarray, np.ndarray]:
    """Logits, and masks of three very different sizes, one of them empty."""
    rng = np.random.default_rng(0)
    shares = np.array([0.0, 0.1, 0.8]).reshape(3, 1, 1, 1)
    return 3 * rng.normal(size=SHAPE), (rng.uniform(size=SHAPE) < shares).astype(float)


def _torch_loss(logits, masks, config: LossConfig, pos_weight: float) -> torch.Tensor:
    logits, masks = torch.as_tensor(logits), torch.as_tensor(masks)
    bce = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(pos_weight, dtype=torch.double))
    pixels = (1, 2, 3) if config.dice_over == "image" else (0, 1, 2, 3)
    probabilities = torch.sigmoid(logits)
    overlap = (probabilities * masks).sum(pixels)
    total = probabilities.sum(pixels) + masks.sum(pixels)
    dice = (2 * overlap + config.smoothing) / (total + config.smoothing)
    return config.dice_weight * (1 - dice.mean()) + config.bce_weight * bce(logits, masks)


def _loss(logits, masks, valid=(True, True, True), config=IMAGE, pos_weight=3.7) -> jax.Array:
    return dice_bce(
        jnp.asarray(logits),
        jnp.asarray(masks),
        jnp.asarray(valid),
        config=config,
        pos_weight=pos_weight,
    )


@pytest.mark.parametrize("smoothing", [1e-6, 1.0])
@pytest.mark.parametrize("dice_over", ["image", "batch"])
@pytest.mark.parametrize("pos_weight", [1.0, 3.7])
@pytest.mark.usefixtures("float64")
def test_loss_and_gradient_are_torchs(pos_weight, dice_over, smoothing):
    config = LossConfig(dice_over=dice_over, smoothing=smoothing)
    logits, masks = _random_maps()
    loss, gradient = jax.value_and_grad(_loss)(
        jnp.asarray(logits), masks, config=config, pos_weight=pos_weight
    )
    torch_logits = torch.tensor(logits, requires_grad=True)
    reference = _torch_loss(torch_logits, masks, config, pos_weight)
    reference.backward()
    assert torch_logits.grad is not None
    np.testing.assert_allclose(loss, reference.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, torch_logits.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.usefixtures("float64")
def test_cross_entropy_per_pixel_is_torchs():
    logits, masks = _random_maps()
    weight = torch.tensor(5.0, dtype=torch.double)
    reference = binary_cross_entropy_with_logits(
        torch.tensor(logits), torch.tensor(masks), pos_weight=weight, reduction="none"
    )
    ours = bce_with_logits(jnp.asarray(logits), jnp.asarray(masks), 5.0)
    np.testing.assert_allclose(ours, reference, rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_pos_weight_multiplies_the_positive_term_alone():
    background = jnp.zeros(SHAPE)
    logits, _ = _random_maps()
    assert _loss(logits, background, pos_weight=1.0) == _loss(logits, background, pos_weight=200.0)


@pytest.mark.usefixtures("float64")
def test_dice_over_image_and_over_batch_are_not_the_same():
    logits, masks = (jnp.asarray(maps) for maps in _random_maps())
    weights = jnp.ones(3)
    over_image = soft_dice(logits, masks, weights, IMAGE)
    over_batch = soft_dice(logits, masks, weights, BATCH)
    assert abs(over_image - over_batch) > 0.1


@pytest.mark.parametrize("config", [IMAGE, BATCH], ids=["image", "batch"])
@pytest.mark.usefixtures("float64")
def test_padding_changes_nothing(config):
    logits, masks = _random_maps()
    padded_logits = np.concatenate([logits, np.full((2, *SHAPE[1:]), 1e4)])
    padded_masks = np.concatenate([masks, np.ones((1, *SHAPE[1:])), np.zeros((1, *SHAPE[1:]))])
    valid = [True, True, True, False, False]
    padded = _loss(padded_logits, padded_masks, valid, config)
    np.testing.assert_allclose(padded, _loss(logits, masks, config=config), rtol=1e-14)


@pytest.mark.parametrize("config", [IMAGE, BATCH], ids=["image", "batch"])
def test_padding_gets_no_gradient(config):
    logits, masks = (jnp.asarray(maps, jnp.float32) for maps in _random_maps())
    gradient = jax.grad(_loss)(logits, masks, (True, False, True), config)
    assert np.abs(gradient[1]).max() == 0
    assert np.abs(gradient[::2]).max() > 0


@pytest.mark.parametrize("config", [IMAGE, BATCH], ids=["image", "batch"])
@pytest.mark.parametrize("logit", [100, -100, 1e4, -1e4])
@pytest.mark.parametrize("mask", [0, 1])
def test_loss_and_gradient_stay_finite(logit, mask, config):
    logits, masks = jnp.full(SHAPE, logit, jnp.float32), jnp.full(SHAPE, mask, jnp.float32)
    loss, gradient = jax.value_and_grad(_loss)(logits, masks, config=config, pos_weight=2.0)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
    if (logit > 0) == mask and mask:
        np.testing.assert_allclose(loss, 0, atol=1e-6)
    if logit < 0 and mask:
        np.testing.assert_allclose(loss, 0.8 + 0.2 * 2 * -logit, rtol=1e-6)


def test_weights_of_the_two_terms_are_settings():
    logits, masks = (jnp.asarray(maps, jnp.float32) for maps in _random_maps())
    dice = dataclasses.replace(IMAGE, dice_weight=1.0, bce_weight=0.0)
    bce = dataclasses.replace(IMAGE, dice_weight=0.0, bce_weight=1.0)
    both = _loss(logits, masks)
    np.testing.assert_allclose(
        both,
        0.8 * _loss(logits, masks, config=dice) + 0.2 * _loss(logits, masks, config=bce),
        rtol=1e-6,
    )


def test_hard_dice_of_known_masks():
    logits = jnp.asarray([[9.0, 1, -1, -9], [9, 9, -9, -9], [-1, -2, -3, -4], [-1, -1, -1, -1]])
    masks = jnp.asarray([[1.0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    dice = hard_dice(logits.reshape(4, 2, 2, 1), masks.reshape(4, 2, 2, 1))
    np.testing.assert_allclose(dice, [0.5, 1, 0, 1])


def test_hard_dice_counts_probability_one_half_as_background():
    zeros = jnp.zeros((1, 2, 2, 1))
    assert hard_dice(zeros, zeros) == 1
