"""Which image stands in which row of which step, and which steps a call does.

A pure function of (seed, step): neither the number of workers nor the step at which a run was
resumed changes it.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from fetal_flax.config import AugmentationConfig
from fetal_flax.data.augmentation import Transform, draw_transform
from fetal_flax.errors import InputError

# What a random number is for; it keeps the streams of one seed apart.
_FOR_ORDER, _FOR_AUGMENTATION = 0, 1


@dataclasses.dataclass(frozen=True)
class TrainingOrder:
    """Which image stands in which row of which step, and how it is varied there.

    Raises:
        InputError: There are fewer images than a batch takes.
    """

    indices: tuple[int, ...]
    """Records to train on."""
    augmentation: AugmentationConfig
    seed: int
    batch_size: int
    """Images per step, over all devices together."""

    def __post_init__(self) -> None:
        steps_per_epoch(len(self.indices), self.batch_size)

    def sample(self, step: int, row: int) -> tuple[int, Transform]:
        """Returns index and transform of a row of a step, counted from the start of the run."""
        epoch, step = divmod(step, steps_per_epoch(len(self.indices), self.batch_size))
        order = _epoch_order(self.seed, epoch, len(self.indices))
        index = self.indices[order[step * self.batch_size + row]]
        if not self.augmentation.enabled:
            return index, Transform()
        rng = np.random.default_rng([self.seed, epoch, _FOR_AUGMENTATION, index])
        return index, draw_transform(self.augmentation, rng)


def steps_per_epoch(image_count: int, batch_size: int) -> int:
    """Returns how many whole batches an epoch has; the images left over sit it out.

    Raises:
        InputError: There are fewer images than a batch takes.
    """
    if image_count < batch_size:
        raise InputError(
            f"setting schedule.batch_size is {batch_size}, but only {image_count} images train"
        )
    return image_count // batch_size


def split_into_calls(
    steps: int, epoch_steps: int, start_step: int, total_steps: int
) -> Iterator[range]:
    """Yields the steps of each call, from `start_step` up to `total_steps`.

    Args:
        steps: Steps per call. An epoch's last may do fewer, and the first one where an epoch has
            begun: calls begin at an epoch's multiples of it.
        epoch_steps: Steps per epoch.
        start_step: The first step.
        total_steps: The step to stop before, an epoch's end.
    """
    first = start_step
    while first < total_steps:
        done = first % epoch_steps
        last = first + min(steps - done % steps, epoch_steps - done)
        yield range(first, last)
        first = last


def shard_rows(batch_size: int, shard: tuple[int, int]) -> range:
    """Returns the rows of a batch that are a process's own.

    Args:
        batch_size: Images per step, over all shards together.
        shard: The process's position among the processes, and their number.

    Raises:
        InputError: The processes can't share the batch evenly.
    """
    position, shards = shard
    if batch_size % shards:
        raise InputError(
            f"setting schedule.batch_size is {batch_size}, not a multiple of {shards} processes"
        )
    return range(position * batch_size // shards, (position + 1) * batch_size // shards)


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    """Returns the order of an epoch's images."""
    order = np.random.default_rng([seed, epoch, _FOR_ORDER]).permutation(count)
    return tuple(order.tolist())
