"""The phantoms as a TFDS dataset."""

import concurrent.futures
import functools
import multiprocessing
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fetal_flax._util.console import track
from fetal_flax._util.machine import available_cpus, can_start_workers, start_worker
from fetal_flax._util.png import encode_png
from fetal_flax.data.builder import Builder
from fetal_flax.data.phantoms.phantom import make_phantom

_PHANTOMS_PER_WORKER = 32  # Fewer don't repay the start of a worker process.


class FetalPhantom(Builder):
    """Procedural phantoms: ultrasound-like images of a fetal head with its exact mask."""

    VERSION = tfds.core.Version("1.0.0")  # Raise it when make_phantom draws other images.

    def __init__(
        self, *, count: int = 0, size: tuple[int, int] = (0, 0), seed: int = 0, **kwargs: Any
    ) -> None:
        self._count, self._size, self._seed = count, size, seed
        super().__init__(**kwargs)

    def _examples(self) -> Iterator[dict[str, Any]]:
        make = functools.partial(_example, self._seed, self._size)
        workers = min(available_cpus(), self._count // _PHANTOMS_PER_WORKER)
        if workers <= 1 or not can_start_workers():
            yield from track(map(make, range(self._count)), "Preparing phantoms", self._count)
            return
        with concurrent.futures.ProcessPoolExecutor(
            workers,
            # A forked child of a process that runs JAX's threads can deadlock.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=start_worker,
        ) as pool:
            examples = pool.map(make, range(self._count), chunksize=4)
            yield from track(examples, "Preparing phantoms", self._count)


def _example(seed: int, size: tuple[int, int], index: int) -> dict[str, Any]:
    phantom = make_phantom(seed, index, height=size[0], width=size[1])
    # Digits enough that the order of the names is that of the numbers.
    name = f"{index:06d}"
    return {
        "image": encode_png(phantom.image),
        "mask": encode_png(phantom.mask),
        "pixel_size_mm": np.float64(phantom.pixel_size_mm),
        "head_circumference_mm": np.float64(phantom.head_circumference_mm),
        "examination": name,
        "name": f"phantom_{name}",
    }
