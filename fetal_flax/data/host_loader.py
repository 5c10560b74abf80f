"""Batches from the host: records loaded and varied by threads or worker processes, ahead of use.

Whatever the host makes, batches or recipes, `prefetch_to_device` moves to the devices.
"""

import atexit
import collections
import contextlib
import dataclasses
import errno
import itertools
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Array

from fetal_flax._util.machine import available_cpus, can_start_workers, start_worker
from fetal_flax.config import AugmentationConfig, DataConfig
from fetal_flax.data.batch import Batch
from fetal_flax.data.datasets import Dataset
from fetal_flax.data.images import network_mask, resize_image
from fetal_flax.data.samples import TrainingOrder, Transform, apply_transform, shard_rows
from fetal_flax.errors import RunError

Item = TypeVar("Item")


class WorkerDiedError(Exception):
    """A worker process ended that should have loaded batches, such as one that was killed."""


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
            index=np.array(index, np.int32),
            photometric=transform.photometric if photometric else None,
        )

    def padding(self) -> Batch:
        """Returns what fills the last batch of an evaluation."""
        return Batch(
            image=np.zeros((*self.image_size, self.channels), np.uint8),
            mask=np.zeros((*self.image_size, 1), np.uint8),
            valid=np.array(False),
            index=np.array(-1, np.int32),
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
        index, transform = self.order.sample(self.steps[step], self.rows[row])
        photometric = self.order.augmentation.photometric
        return self.sampler.sample(index, transform, photometric=photometric)


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
    except OSError as error:
        # Workers hand batches over in shared memory; records come from ArrayRecord, which raises
        # no OSError.
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
        raise RunError(
            f"the data workers' shared memory, /dev/shm, is full ({error.strerror}): give it more "
            "(docker run --shm-size 1g), or go on with --resume --data.workers 0"
        ) from None
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
