"""Data sets in the devices' own memory, and the recipes of batches that are gathered there.

HC18 at 256×256 is 131 MB as uint8. Once there, an epoch needs nothing from the host but which
image stands where and how it is warped, a few kilobytes, so nothing can wait for data. Order and
augmentation are those of the host's loader (`TrainingOrder`), drawn by the same code; the steps
make batches of them (`gather_batch`).
"""

import concurrent.futures
from collections.abc import Generator, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int64

from fetal_flax._util.machine import available_cpus
from fetal_flax.data.batch import BatchRecipe, DeviceDataset
from fetal_flax.data.datasets import Dataset
from fetal_flax.data.images import network_mask, resize_image
from fetal_flax.data.photometric import Photometric
from fetal_flax.data.samples import TrainingOrder, sampling_matrix, shard_rows


def load_device_dataset(
    dataset: Dataset,
    size: tuple[int, int],
    sharding: jax.sharding.Sharding,
    *,
    soft_masks: bool = False,
) -> DeviceDataset:
    """Reads a data set, resizes it as the host's loader does, and puts it on the devices.

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
    return DeviceDataset(*(jax.make_array_from_process_local_data(sharding, a) for a in arrays))


def device_foreground_pixels(dataset: DeviceDataset) -> Int64[np.ndarray, " records"]:
    """Returns what `foreground_pixels` counts, from the images that are there."""
    return np.asarray(dataset.mask.sum((1, 2), dtype=jnp.int32)).astype(np.int64)


def training_recipes(
    order: TrainingOrder,
    size: tuple[int, int],
    calls: Iterable[range],
    shard: tuple[int, int] = (0, 1),
) -> Generator[BatchRecipe, None, None]:
    """Yields the recipes of calls of several steps.

    Args:
        order: Which image stands where.
        size: Height and width of the images.
        calls: The steps of each call.
        shard: This process's position among the processes, and their number; each gets the rows
            of the batches that are its own.
    """
    rows = shard_rows(order.batch_size, shard)
    for call in calls:
        indices, transforms = zip(
            *(order.sample(step, row) for step in call for row in rows), strict=True
        )
        matrices = np.stack([sampling_matrix(transform, size) for transform in transforms])
        photometric = None
        if order.augmentation.photometric:
            parts = (transform.photometric for transform in transforms)
            photometric = Photometric(
                *(np.stack(values).reshape(-1, len(rows)) for values in zip(*parts, strict=True))
            )
        yield BatchRecipe(
            np.array(indices, np.int32).reshape(-1, len(rows)),
            matrices.astype(np.float32).reshape(-1, len(rows), 2, 3),
            photometric,
        )


def evaluation_recipes(
    indices: Sequence[int], batch_size: int, shard: tuple[int, int] = (0, 1)
) -> Generator[BatchRecipe, None, None]:
    """Yields recipes of one step each that take every record of `indices` once, as it is, in order.

    `shard` is that of `training_recipes`.
    """
    rows = shard_rows(batch_size, shard)
    for start in range(0, len(indices), batch_size):
        whole = np.full((1, batch_size), -1, np.int32)
        taken = indices[start : start + batch_size]
        whole[0, : len(taken)] = taken
        own = whole[:, rows.start : rows.stop]
        unmoved = np.broadcast_to(np.eye(2, 3, dtype=np.float32), (*own.shape, 2, 3))
        yield BatchRecipe(own, unmoved)
