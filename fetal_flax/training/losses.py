"""Dice plus binary cross-entropy (description, section 8.1), and the hard Dice that is reported.

Sums over a batch that is sharded under `jax.jit` are global, so no value here depends on how many
devices share the batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fetal_flax.config import LossConfig

Logits = Float[Array, "batch height width 1"]
Masks = Float[Array, "batch height width 1"]
PIXELS = (1, 2, 3)


def dice_bce(
    logits: Logits,
    masks: Masks,
    valid: Bool[Array, " batch"] | None = None,
    *,
    config: LossConfig | None = None,
    pos_weight: float | Array = 1.0,
) -> Float[Array, ""]:
    """Weighted sum of Dice loss and cross-entropy over the valid images.

    Args:
        logits: Before the sigmoid, (batch, height, width, 1).
        masks: 0 or 1, or a share of the pixel in between, as floats of the logits' dtype.
        valid: False on the padding of a last batch; None where there is none.
        config: Weights, smoothing, and what Dice is taken over; None takes the defaults.
        pos_weight: Factor on the cross-entropy of foreground pixels.

    Example:
        >>> masks = jnp.zeros((1, 32, 32, 1)).at[:, 8:24, 8:24].set(1.0)
        >>> right, wrong = 20 * (masks - 0.5), 20 * (0.5 - masks)
        >>> bool(ff.losses.dice_bce(right, masks) < 1e-3 < ff.losses.dice_bce(wrong, masks))
        True
    """
    config = config or LossConfig()
    weights = jnp.ones(len(logits), logits.dtype) if valid is None else valid.astype(logits.dtype)
    dice = soft_dice(logits, masks, weights, config)
    cross_entropy = bce_with_logits(logits, masks, pos_weight).mean(PIXELS)
    cross_entropy = (cross_entropy * weights).sum() / weights.sum()
    return config.dice_weight * (1 - dice) + config.bce_weight * cross_entropy


def soft_dice(
    logits: Logits, masks: Masks, weights: Float[Array, " batch"], config: LossConfig
) -> Float[Array, ""]:
    """Dice of probabilities: mean over images, or one over the batch (`config.dice_over`).

    Args:
        logits: Before the sigmoid.
        masks: 0 or 1.
        weights: 1 for images that count, 0 for padding.
        config: Smoothing, and what Dice is taken over.
    """
    probabilities = jax.nn.sigmoid(logits)
    overlap = (probabilities * masks).sum(PIXELS)
    total = (probabilities + masks).sum(PIXELS)
    if config.dice_over == "batch":
        overlap, total = (overlap * weights).sum(), (total * weights).sum()
        return (2 * overlap + config.smoothing) / (total + config.smoothing)
    dice = (2 * overlap + config.smoothing) / (total + config.smoothing)
    return (dice * weights).sum() / weights.sum()


def bce_with_logits(
    logits: Logits, masks: Masks, pos_weight: float | Array
) -> Float[Array, "batch height width 1"]:
    """Cross-entropy per pixel; the log-sigmoid form stays finite whatever the logit."""
    positive = pos_weight * masks * jax.nn.log_sigmoid(logits)
    negative = (1 - masks) * jax.nn.log_sigmoid(-logits)
    return -(positive + negative)


def hard_dice(logits: Logits, masks: Masks) -> Float[Array, " batch"]:
    """Dice of the mask at probability 0.5, per image; 1 where both masks are empty."""
    predicted = (logits > 0).astype(logits.dtype)
    overlap = (predicted * masks).sum(PIXELS)
    total = (predicted + masks).sum(PIXELS)
    return jnp.where(total == 0, 1, 2 * overlap / jnp.maximum(total, 1))
