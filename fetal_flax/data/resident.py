"""The data set in the devices' own memory: shuffled, varied and batched without the host.

HC18 at 256×256 is 131 MB as uint8. Once there, an epoch needs nothing from the host but which
image stands where and how it is warped, a few kilobytes, so nothing can wait for data. Order and
augmentation are those of the host's pipeline (`TrainingOrder`), drawn by the same code; the warp
agrees with albumentations' to a grey level (tests/data/test_resident.py).
"""

import concurrent.futures
import functools
from collections.abc import Generator, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float32, Int32, Int64, UInt8

from fetal_flax.data.augmentation import sampling_matrix
from fetal_flax.data.builders import Dataset
from fetal_flax.data.images import network_mask, resize_image
from fetal_flax.data.photometric import Photometric
from fetal_flax.data.pipeline import (
    Batch,
    HostOrDevice,
    TrainingOrder,
    shard_rows,
)
from fetal_flax.data.workers import available_cpus


class Resident(NamedTuple):
    """A data set's images at the network's size, on every device."""

    image: UInt8[Array, "records height width"]
    mask: UInt8[Array, "records height width"]
    """As in `Batch`."""


class Plan(NamedTuple):
    """What the rows of some steps hold."""

    record: Int32[HostOrDevice, "steps batch"]
    """Index in the data set; -1 where padded."""
    matrix: Float32[HostOrDevice, "steps batch 2 3"]
    """From a pixel of the batch to where in the image it is taken from: `sampling_matrix`."""
    photometric: Photometric | None = None
    """How the step varies grey levels, where it does; its arrays are "steps batch"."""


def load_resident(
    dataset: Dataset,
    size: tuple[int, int],
    sharding: jax.sharding.Sharding,
    *,
    soft_masks: bool = False,
) -> Resident:
    """Reads a data set, resizes it as the host's pipeline does, and puts it on the devices.

    Args:
        dataset: The data set.
        size: Height and width that the network sees.
        sharding: Replicated over the devices.
        soft_masks: The setting `data.soft_masks`.
    """

    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        record = dataset.record(index)
        mask = network_mask(record.mask, size, soft=soft_masks)
        return resize_image(record.image, size), mask

    with concurrent.futures.ThreadPoolExecutor(available_cpus()) as pool:
        images, masks = zip(*pool.map(load, range(len(dataset))), strict=True)
    arrays = np.stack(images), np.stack(masks)
    return Resident(*(jax.make_array_from_process_local_data(sharding, a) for a in arrays))


def resident_foreground_pixels(resident: Resident) -> Int64[np.ndarray, " records"]:
    """Returns what `foreground_pixels` counts, from the images that are there."""
    return np.asarray(resident.mask.sum((1, 2), dtype=jnp.int32)).astype(np.int64)


def training_plans(
    order: TrainingOrder,
    size: tuple[int, int],
    calls: Iterable[range],
    shard: tuple[int, int] = (0, 1),
) -> Generator[Plan, None, None]:
    """Yields the plans of calls of several steps.

    Args:
        order: Which image stands where.
        size: Height and width of the images.
        calls: The steps of each call.
        shard: This process's position among the processes, and their number; each gets the rows
            of the batches that are its own.
    """
    rows = shard_rows(order.batch_size, shard)
    for call in calls:
        records, transforms = zip(
            *(order.sample(step, row) for step in call for row in rows), strict=True
        )
        matrices = np.stack([sampling_matrix(transform, size) for transform in transforms])
        photometric = None
        if order.augmentation.photometric:
            parts = (transform.photometric for transform in transforms)
            photometric = Photometric(
                *(np.stack(values).reshape(-1, len(rows)) for values in zip(*parts, strict=True))
            )
        yield Plan(
            np.array(records, np.int32).reshape(-1, len(rows)),
            matrices.astype(np.float32).reshape(-1, len(rows), 2, 3),
            photometric,
        )


def evaluation_plans(
    indices: Sequence[int], batch_size: int, shard: tuple[int, int] = (0, 1)
) -> Generator[Plan, None, None]:
    """Yields plans of one step each that take every record of `indices` once, as it is, in order.

    `shard` is that of `training_plans`.
    """
    rows = shard_rows(batch_size, shard)
    for start in range(0, len(indices), batch_size):
        record = np.full((1, batch_size), -1, np.int32)
        taken = indices[start : start + batch_size]
        record[0, : len(taken)] = taken
        record = record[:, rows.start : rows.stop]
        yield Plan(record, np.broadcast_to(np.eye(2, 3, dtype=np.float32), (*record.shape, 2, 3)))


def take_batch(resident: Resident, step: Plan, channels: int, *, soft_masks: bool = False) -> Batch:
    """Returns the batch of one step; a pure function for use under jit.

    Args:
        resident: The images.
        step: One step's row of a plan, without the leading axis.
        channels: Channels of the images; grey is repeated.
        soft_masks: The setting `data.soft_masks`.
    """
    record = jnp.asarray(step.record)
    image, mask = jax.vmap(functools.partial(_warp, soft=soft_masks))(
        resident.image[record], resident.mask[record], jnp.asarray(step.matrix)
    )
    return Batch(
        image=jnp.repeat(image[..., None], channels, axis=-1),
        mask=mask[..., None],
        valid=record >= 0,
        record=record,
        photometric=step.photometric,
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
