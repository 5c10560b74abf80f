"""Random changes of grey levels: brightness, contrast, blur, speckle and acoustic shadows.

The host draws a few numbers per image; the step on the devices applies them, whoever prepared the
batch. So both backends vary images alike, to the bit, and nothing of it waits for the host.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt32

from fetal_flax.config import AugmentationConfig

HostOrDevice = np.ndarray | np.generic | Array
_STEEPEST = 0.5
"""Largest tangent of a shadow's angle to the vertical: half the opening of a convex probe."""
_SHADOW_WIDTHS = (0.02, 0.1)
"""Narrowest and widest standard deviation of a shadow across, as a share of the image's width."""


class Photometric(NamedTuple):
    """What is done to the grey levels of each image of a batch; the defaults do nothing."""

    gain: Float32[HostOrDevice, "*batch"] = np.float32(1)
    """Factor on grey levels."""
    gamma: Float32[HostOrDevice, "*batch"] = np.float32(1)
    """Power that grey levels in [0, 1] are raised to."""
    blur_px: Float32[HostOrDevice, "*batch"] = np.float32(0)
    """Standard deviation of a Gaussian blur."""
    speckle: Float32[HostOrDevice, "*batch"] = np.float32(0)
    """Standard deviation of multiplicative noise."""
    speckle_seed: UInt32[HostOrDevice, "*batch"] = np.uint32(0)
    """Seeds the noise."""
    shadow: Float32[HostOrDevice, "*batch"] = np.float32(0)
    """Share of brightness lost in the middle of a shadow."""
    shadow_x: Float32[HostOrDevice, "*batch"] = np.float32(0)
    """Where its middle meets the image's top, as a share of the width."""
    shadow_slope: Float32[HostOrDevice, "*batch"] = np.float32(0)
    """How far it runs to the right on its way down, as a share of the width."""
    shadow_width: Float32[HostOrDevice, "*batch"] = np.float32(1)
    """Standard deviation of its profile, as a share of the width."""


UNCHANGED = Photometric()
"""Leaves an image as it is."""


def draw_photometric(config: AugmentationConfig, rng: np.random.Generator) -> Photometric:
    """Draws each part on its own, uniformly within its range; gamma uniformly in its logarithm."""
    # All numbers are drawn whether used or not: a probability doesn't change the other parts.
    used = rng.random(5) < config.photometric_probability
    gain, gamma, slope = rng.uniform(-1, 1, 3)
    blur, speckle, shadow, x = rng.random(4)
    width = rng.uniform(*_SHADOW_WIDTHS)
    seed = rng.integers(2**32, dtype=np.uint32)
    return Photometric(
        gain=np.float32(1 + used[0] * gain * config.gain),
        gamma=np.float32((1 + config.gamma) ** (used[1] * gamma)),
        blur_px=np.float32(used[2] * blur * config.blur_px),
        speckle=np.float32(used[3] * speckle * config.speckle),
        speckle_seed=seed,
        shadow=np.float32(used[4] * shadow * config.shadow),
        shadow_x=np.float32(x),
        shadow_slope=np.float32(_STEEPEST * slope),
        shadow_width=np.float32(width),
    )


def apply_photometric(
    images: Float[Array, "batch height width channels"],
    variation: Photometric,
    config: AugmentationConfig,
) -> Float[Array, "batch height width channels"]:
    """Returns images with their grey levels changed; a pure function for use under jit.

    Args:
        images: In [0, 1].
        variation: What is done to each; its arrays are "batch".
        config: Parts whose range is 0 are left out, and the blur's reach is chosen.

    Returns:
        Images in [0, 1]: blurred, raised to a power, multiplied by gain, shadow and noise, clipped.
    """
    if config.blur_px:
        sigma = jnp.asarray(variation.blur_px, images.dtype)
        images = jax.vmap(lambda image, sigma: _blur(image, sigma, config.blur_px))(images, sigma)
    if config.gamma:
        images = images ** _per_image(variation.gamma, images)
    if config.gain:
        images = images * _per_image(variation.gain, images)
    if config.shadow:
        images = images * _transmission(variation, images)
    if config.speckle:
        shape = (*images.shape[1:3], 1)
        noise = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(
            jnp.asarray(variation.speckle_seed)
        )
        images = images * (1 + _per_image(variation.speckle, images) * noise.astype(images.dtype))
    return jnp.clip(images, 0, 1)


def _per_image(values: HostOrDevice, images: Array) -> Array:
    return jnp.asarray(values, images.dtype).reshape(-1, 1, 1, 1)


def _blur(image: Array, sigma: Array, largest: float) -> Array:
    """Returns a "height width channels" image convolved with a Gaussian, edges repeated."""
    reach = int(np.ceil(2 * largest))
    offsets = jnp.arange(-reach, reach + 1, dtype=image.dtype)
    weights = jnp.exp(-0.5 * (offsets / jnp.maximum(sigma, 1e-3)) ** 2)
    weights = weights / weights.sum()
    for axis in (0, 1):
        width = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
        padded = jnp.pad(image, width, mode="edge")
        size = image.shape[axis]
        image = jnp.zeros((), image.dtype)
        for i in range(2 * reach + 1):
            image = image + weights[i] * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
    return image


def _transmission(variation: Photometric, images: Array) -> Array:
    """Returns the share of brightness that each pixel keeps behind its image's shadow."""
    height, width = images.shape[1:3]
    down = jnp.linspace(0, 1, height, dtype=images.dtype).reshape(1, -1, 1, 1)
    right = jnp.linspace(0, 1, width, dtype=images.dtype).reshape(1, 1, -1, 1)
    middle = (
        _per_image(variation.shadow_x, images) + _per_image(variation.shadow_slope, images) * down
    )
    across = (right - middle) / _per_image(variation.shadow_width, images)
    return 1 - _per_image(variation.shadow, images) * jnp.exp(-0.5 * across**2)
