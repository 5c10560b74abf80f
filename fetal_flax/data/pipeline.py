"""From records to batches on the device: which image when, loading ahead, and the transfer.

What a training batch holds is a pure function of (seed, step): neither the number of workers nor
the step at which a run was resumed changes it.
"""

import atexit
import collections
import contextlib
import dataclasses
import functools
import itertools
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Array, Bool, Int32, UInt8

from fetal_flax.config import AugmentationConfig, DataConfig
from fetal_flax.data.augmentation import Transform, apply_transform, draw_transform
from fetal_flax.data.builders import Dataset
from fetal_flax.data.images import network_mask, resize_image
from fetal_flax.data.photometric import Photometric
from fetal_flax.data.workers import available_cpus, can_start_workers, start_worker
from fetal_flax.errors import InputError

HostOrDevice: TypeAlias = np.ndarray | Array
Item = TypeVar("Item")

# What a random number is for; it keeps the streams of one seed apart.
_FOR_ORDER, _FOR_AUGMENTATION = 0, 1


class WorkerDiedError(Exception):
    """A worker process ended that should have loaded batches, such as one that was killed."""


class Batch(NamedTuple):
    """Images at the network's size; uint8, which moves a quarter of float32's bytes."""

    image: UInt8[HostOrDevice, "batch height width channels"]
    """0 to 255; the step on the device scales to [0, 1]."""
    mask: UInt8[HostOrDevice, "batch height width 1"]
    """1 in the head, 0 outside; with `data.soft_masks` the share of the pixel in it, 0 to 255."""
    valid: Bool[HostOrDevice, "batch"]
    """False where the last batch is padded."""
    record: Int32[HostOrDevice, "batch"]
    """Index in the dataset; -1 where padded."""
    photometric: Photometric | None = None
    """How the step varies grey levels, where it does."""


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
        """Returns record and transform of a row of a step, counted from the start of the run."""
        epoch, step = divmod(step, steps_per_epoch(len(self.indices), self.batch_size))
        order = _epoch_order(self.seed, epoch, len(self.indices))
        record = self.indices[order[step * self.batch_size + row]]
        if not self.augmentation.enabled:
            return record, Transform()
        rng = np.random.default_rng([self.seed, epoch, _FOR_AUGMENTATION, record])
        return record, draw_transform(self.augmentation, rng)


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


def training_batches(
    dataset: Dataset,
    indices: Sequence[int],
    config: DataConfig,
    augmentation: AugmentationConfig,
    *,
    channels: int,
    seed: int,
    batch_size: int,
    total_steps: int,
    start_step: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Generator[Batch, None, None]:
    """Returns the batches of the steps from `start_step` up to `total_steps`.

    Each epoch shuffles `indices` anew. Closing the iterator ends its workers; a script that uses
    worker processes needs the usual `if __name__ == "__main__"`.

    Args:
        dataset: Where the images are.
        indices: Records to train on.
        config: Its `image_size`, `soft_masks`, `workers` and `prefetch` are read.
        augmentation: How the images are varied.
        channels: Channels of the images; grey is repeated.
        seed: Seeds order and augmentation.
        batch_size: Images per step, over all shards together.
        total_steps: The step to stop before, counted from the start of the run.
        start_step: The first step.
        shard: This process's position among the processes, and their number; each gets its
            share of the rows of every batch.

    Raises:
        InputError: There are fewer images than a batch takes, or shards can't share it evenly.
    """
    samples = _TrainingSamples(
        TrainingOrder(tuple(indices), augmentation, seed, batch_size),
        _Sampler(dataset, config.image_size, channels, config.soft_masks),
        steps=range(start_step, total_steps),
        rows=shard_rows(batch_size, shard),
    )
    workers = _default_workers() if config.workers is None else config.workers
    return _batches(samples, len(samples.rows), config.prefetch, workers)


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


def stack_steps(
    batches: Generator[Batch, None, None], calls: Iterable[range]
) -> Generator[Batch, None, None]:
    """Yields what calls of several steps take: batches behind a leading axis of steps.

    Args:
        batches: The steps' batches; closed at the end.
        calls: The steps of each call.
    """
    with contextlib.closing(batches):
        for steps in calls:
            several = itertools.islice(batches, len(steps))
            yield jax.tree.map(lambda *arrays: np.stack(arrays), *several)


def evaluation_batches(
    dataset: Dataset,
    indices: Sequence[int],
    config: DataConfig,
    *,
    channels: int,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
) -> Generator[Batch, None, None]:
    """Returns every record of `indices` once, in order, the last batch padded with zeros.

    Threads load them: worker processes take seconds to start, at every evaluation. `shard` is that
    of `training_batches`.
    """
    rows = shard_rows(batch_size, shard)
    sampler = _Sampler(dataset, config.image_size, channels, config.soft_masks)
    samples = _EvaluationSamples(sampler, tuple(indices), batch_size, rows)
    return _batches(samples, len(rows), config.prefetch, workers=0)


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


class DeviceBatches(Generic[Item]):
    """Iterator over batches on the devices; `prefetch_to_device` makes it."""

    def __init__(
        self,
        batches: Iterator[Any],
        sharding: jax.sharding.Sharding,
        size: int,
        prepare: Callable[[Any], Item],
    ):
        self._batches = batches
        self._sharding = sharding
        self._size = size
        self._prepare = prepare
        self._ready: collections.deque[Item] = collections.deque()
        self.waited_seconds = 0.0
        """Time spent in waiting for the host's batches; the rest of the loop is not counted."""

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        while len(self._ready) < self._size and (batch := self._next_on_host()) is not None:
            # Returns at once: the transfer runs while the device computes.
            self._ready.append(self._prepare(jax.tree.map(self._put, batch)))
        if not self._ready:
            raise StopIteration
        return self._ready.popleft()

    def close(self) -> None:
        """Ends the workers behind the batches, where there are any."""
        if isinstance(self._batches, Generator):
            self._batches.close()

    def _next_on_host(self) -> Any:
        start = time.perf_counter()
        batch = next(self._batches, None)
        self.waited_seconds += time.perf_counter() - start
        return batch

    def _put(self, array: np.ndarray) -> Array:
        return jax.make_array_from_process_local_data(self._sharding, array)


def prefetch_to_device(
    batches: Iterator[Any],
    sharding: jax.sharding.Sharding,
    size: int = 2,
    prepare: Callable[[Any], Item] = lambda batch: batch,
) -> DeviceBatches[Item]:
    """Moves batches, or what else a step takes, to the devices ahead of their use.

    Args:
        batches: Batches on the host; with several processes, each one's share.
        sharding: How their arrays are spread over the devices.
        size: How many batches lie on the devices at a time.
        prepare: What is done to each on the devices.
    """
    return DeviceBatches(batches, sharding, size, prepare)


@dataclasses.dataclass(frozen=True)
class _Sampler:
    """Loads single records as batches without their leading axis."""

    dataset: Dataset
    image_size: tuple[int, int]
    channels: int
    soft_masks: bool

    def sample(self, index: int, transform: Transform, *, photometric: bool = False) -> Batch:
        """Loads one record and varies it; its grey levels are left to the step."""
        record = self.dataset.record(index)
        image, mask = apply_transform(
            transform,
            resize_image(record.image, self.image_size),
            network_mask(record.mask, self.image_size, soft=self.soft_masks),
            soft=self.soft_masks,
        )
        return Batch(
            image=np.repeat(image[..., None], self.channels, axis=-1),
            mask=mask[..., None],
            valid=np.array(True),
            record=np.array(index, np.int32),
            photometric=transform.photometric if photometric else None,
        )

    def padding(self) -> Batch:
        """Returns what fills the last batch of an evaluation."""
        return Batch(
            image=np.zeros((*self.image_size, self.channels), np.uint8),
            mask=np.zeros((*self.image_size, 1), np.uint8),
            valid=np.array(False),
            record=np.array(-1, np.int32),
        )


@dataclasses.dataclass(frozen=True)
class _TrainingSamples:
    """The training images by position: row by row of step by step (a Grain source)."""

    order: TrainingOrder
    sampler: _Sampler
    steps: range
    rows: range

    def __len__(self) -> int:
        return len(self.steps) * len(self.rows)

    def __getitem__(self, position: int) -> Batch:
        step, row = divmod(position, len(self.rows))
        record, transform = self.order.sample(self.steps[step], self.rows[row])
        photometric = self.order.augmentation.photometric
        return self.sampler.sample(record, transform, photometric=photometric)


@dataclasses.dataclass(frozen=True)
class _EvaluationSamples:
    """The images of an evaluation by position, and zeros behind the last (a Grain source)."""

    sampler: _Sampler
    indices: tuple[int, ...]
    batch_size: int
    rows: range

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size) * len(self.rows)

    def __getitem__(self, position: int) -> Batch:
        step, row = divmod(position, len(self.rows))
        index = step * self.batch_size + self.rows[row]
        if index >= len(self.indices):
            return self.sampler.padding()
        return self.sampler.sample(self.indices[index], Transform())


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    """Returns the order of an epoch's images."""
    order = np.random.default_rng([seed, epoch, _FOR_ORDER]).permutation(count)
    return tuple(order.tolist())


def _batches(
    samples: Any, batch_size: int, prefetch: int, workers: int
) -> Generator[Batch, None, None]:
    """Returns batches of consecutive samples, loaded ahead by threads or worker processes."""
    threads = min(available_cpus(), prefetch) if workers == 0 else 1
    batches = (
        grain.MapDataset.source(samples)
        .batch(batch_size)
        .to_iter_dataset(
            grain.ReadOptions(
                num_threads=threads, prefetch_buffer_size=prefetch if workers == 0 else 1
            )
        )
    )
    if workers > 0:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags, which only its apps parse.
        options = grain.multiprocessing.MultiprocessingOptions(
            num_workers=workers, per_worker_buffer_size=-(-prefetch // workers)
        )
        batches = batches.mp_prefetch(options, worker_init_fn=start_worker)
    generator = _closing(iter(batches))
    _open_batches.add(generator)
    return generator


def _closing(iterator: Any) -> Generator[Batch, None, None]:
    """Yields from a Grain iterator and closes it at the end, or when itself closed."""
    try:
        yield from iterator
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise WorkerDiedError(str(error)) from error
    finally:
        iterator.close()


_open_batches: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()


@atexit.register
def _close_open_batches() -> None:
    """Ends the workers of a script that just stops; Python's teardown is too late for them."""
    for batches in list(_open_batches):
        batches.close()


def _default_workers() -> int:
    """Returns how many worker processes suit this machine; threads serve few CPUs better."""
    cpus = available_cpus()
    return min(8, cpus // 2) if cpus > 4 and can_start_workers() else 0
