"""Batches moved to the devices ahead of their use."""

import collections
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jaxtyping import Array

Item = TypeVar("Item")


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
