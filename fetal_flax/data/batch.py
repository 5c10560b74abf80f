"""What a training step takes: a batch of images, or a data set on the devices and what to take."""

import functools
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float32, Int32, UInt8

from fetal_flax.data.photometric import Photometric

HostOrDevice: TypeAlias = np.ndarray | Array


class Batch(NamedTuple):
    """Images at the network's size; uint8, which moves a quarter of float32's bytes."""

    image: UInt8[HostOrDevice, "batch height width channels"]
    """0 to 255; the step on the device scales to [0, 1]."""
    mask: UInt8[HostOrDevice, "batch height width 1"]
    """1 in the head, 0 outside; with `data.soft_masks` the share of the pixel in it, 0 to 255."""
    valid: Bool[HostOrDevice, "batch"]
    """False where the last batch is padded."""
    index: Int32[HostOrDevice, "batch"]
    """Of the image in the data set; -1 where padded."""
    photometric: Photometric | None = None
    """How the step varies grey levels, where it does."""


class DeviceDataset(NamedTuple):
    """A data set's images at the network's size, on every device."""

    image: UInt8[Array, "records height width"]
    mask: UInt8[Array, "records height width"]
    """As in `Batch`."""


class BatchRecipe(NamedTuple):
    """How the batches of some steps are made of a `DeviceDataset`."""

    indices: Int32[HostOrDevice, "steps batch"]
    """Of the images in the data set; -1 where padded."""
    affine: Float32[HostOrDevice, "steps batch 2 3"]
    """From a pixel of the batch to where in the image it is taken from: `sampling_matrix`."""
    photometric: Photometric | None = None
    """How the step varies grey levels, where it does; its arrays are "steps batch"."""


def gather_batch(
    dataset: DeviceDataset, recipe: BatchRecipe, channels: int, *, soft_masks: bool = False
) -> Batch:
    """Returns the batch of one step; a pure function for use under jit.

    The warp agrees with that of `apply_transform` to a grey level (tests/data/test_batch.py).

    Args:
        dataset: The images.
        recipe: One step's, without the leading axis.
        channels: Channels of the images; grey is repeated.
        soft_masks: The setting `data.soft_masks`.
    """
    index = jnp.asarray(recipe.indices)
    image, mask = jax.vmap(functools.partial(_warp, soft=soft_masks))(
        dataset.image[index], dataset.mask[index], jnp.asarray(recipe.affine)
    )
    return Batch(
        image=jnp.repeat(image[..., None], channels, axis=-1),
        mask=mask[..., None],
        valid=index >= 0,
        index=index,
        photometric=recipe.photometric,
    )


def _warp(
    image: UInt8[Array, "height width"],
    mask: UInt8[Array, "height width"],
    matrix: Float32[Array, "2 3"],
    *,
    soft: bool,
) -> tuple[UInt8[Array, "height width"], UInt8[Array, "height width"]]:
    """Samples an image bilinearly and its mask at the nearest pixel, or alike; 0 lies outside."""
    y, x = jnp.mgrid[: image.shape[0], : image.shape[1]].astype(jnp.float32)
    from_x, from_y = (row[0] * x + row[1] * y + row[2] for row in matrix)

    def sample(pixels: UInt8[Array, "height width"], order: int) -> UInt8[Array, "height width"]:
        values = map_coordinates(pixels.astype(jnp.float32), (from_y, from_x), order=order)
        return (jnp.round(values) if order else values).astype(jnp.uint8)

    return sample(image, 1), sample(mask, int(soft))
