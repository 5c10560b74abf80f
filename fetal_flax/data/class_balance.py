"""How much of each image the head covers: counted once per prepared data set and image size."""

import concurrent.futures
import contextlib
import json
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from fetal_flax._util.files import json_bytes, write_atomically
from fetal_flax._util.machine import available_cpus
from fetal_flax.data.datasets import Dataset
from fetal_flax.data.images import resize_mask
from fetal_flax.errors import InputError

Counts = Int64[np.ndarray, " records"]


def foreground_pixels(dataset: Dataset, size: tuple[int, int]) -> Counts:
    """Returns the pixels of each record's head at the network's size, each whole or not at all.

    They are kept beside the prepared records, for every split of them.

    Args:
        dataset: The data set.
        size: Height and width that the network sees.
    """
    path = dataset.folder and dataset.folder / f"foreground-{size[0]}x{size[1]}.json"
    if path and (kept := _read(path, len(dataset))) is not None:
        return kept

    def count(index: int) -> int:
        return int(np.count_nonzero(resize_mask(dataset.record(index).mask, size)))

    with concurrent.futures.ThreadPoolExecutor(available_cpus()) as pool:
        counts = list(pool.map(count, range(len(dataset))))
    if path:
        with contextlib.suppress(InputError):  # A cache of somebody else's: counted every time.
            write_atomically(path, json_bytes({"pixels": counts}))
    return np.array(counts, np.int64)


def _read(path: Path, records: int) -> Counts | None:
    try:
        counts = np.array(json.loads(path.read_bytes())["pixels"], np.int64)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return counts if counts.shape == (records,) else None
