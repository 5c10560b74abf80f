"""What a training step takes: a batch of images, or a data set on the devices and what to take."""

from typing import NamedTuple, TypeAlias

import numpy as np
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
