"""HC18 and the phantoms as datasets: prepared once by TFDS, then read at random.

A prepared dataset is a directory under the cache that TFDS wrote whole or not at all. Reading
needs no TensorFlow: records come from ArrayRecord files, images as the PNG bytes they were
stored as.
"""

import concurrent.futures.process
import contextlib
import dataclasses
import functools
import importlib.util
import io
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from fetal_flax._util.cache_folder import cache_folder, check_temporary_files
from fetal_flax._util.locks import locked
from fetal_flax._util.machine import (
    MISSING_GUARD,
    require_main_guard,
)
from fetal_flax.config import DataConfig
from fetal_flax.data import hc18
from fetal_flax.data.builder import SPLIT
from fetal_flax.data.hc18.builder import Hc18
from fetal_flax.data.images import decode_gray
from fetal_flax.data.phantoms.builder import FetalPhantom
from fetal_flax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Record:
    """One image at native size, with its truth."""

    image: UInt8[np.ndarray, "height width"]
    mask: UInt8[np.ndarray, "height width"]
    """255 in the head, 0 outside."""
    pixel_size_mm: float
    head_circumference_mm: float
    examination: str
    name: str


class Dataset:
    """The records of a prepared dataset, sorted by name; can be pickled.

    Args:
        source: The stored records.
        names: Their names.
        examinations: Their examinations.
        folder: Where they are stored, if they are: what is derived from them may be kept there.
    """

    def __init__(
        self,
        source: Sequence[Any],
        *,
        names: Sequence[str],
        examinations: Sequence[str],
        folder: Path | None = None,
    ) -> None:
        self._source = source
        self.folder = folder
        self.names = tuple(names)
        self.examinations = tuple(examinations)

    def __len__(self) -> int:
        return len(self.names)

    def record(self, index: int) -> Record:
        """Reads and decodes one record."""
        stored = self._source[index]
        return Record(
            image=decode_gray(stored["image"]),
            mask=decode_gray(stored["mask"]),
            pixel_size_mm=float(stored["pixel_size_mm"]),
            head_circumference_mm=float(stored["head_circumference_mm"]),
            examination=stored["examination"].decode(),
            name=stored["name"].decode(),
        )


def open_dataset(config: DataConfig, seed: int) -> Dataset:
    """Opens the dataset that `config` names, after preparing it if this is the first time.

    Args:
        config: Its `dataset`, `data_dir`, `cache_dir` and phantom fields are read.
        seed: Seeds the phantoms; HC18 doesn't depend on it.

    Raises:
        InputError: HC18 is neither given nor downloadable, its files have problems, the cache
            can't be written, or this system has no ArrayRecord.
    """
    if importlib.util.find_spec("array_record") is None:
        raise InputError(
            "data sets are kept in ArrayRecord files, and there is no array-record for this "
            "system: use Linux or macOS, on Windows WSL"
        )
    cache = cache_folder(config.cache_dir)
    if config.dataset == "fetal_phantom":
        height, width = config.phantom_size
        folder = cache / "datasets" / f"phantom-{height}x{width}-{config.phantom_count}-{seed}"
        builder = functools.partial(
            FetalPhantom, count=config.phantom_count, size=config.phantom_size, seed=seed
        )
    else:
        source = (
            Path(os.path.expanduser(config.data_dir)) if config.data_dir else hc18.download(cache)
        )
        # Another folder, or the same after a change, is another dataset.
        folder = cache / "datasets" / f"hc18-{hc18.fingerprint(source)}"
        builder = functools.partial(Hc18, source=source)
    make_builder = functools.partial(builder, data_dir=folder, file_format="array_record")
    _prepare(make_builder, folder)
    prepared: Any = make_builder()
    stored = {name: tfds.decode.SkipDecoding() for name in ("image", "mask")}
    records = prepared.as_data_source(split=SPLIT, decoders=stored)
    return Dataset(records, folder=Path(prepared.data_path), **prepared.info.metadata)


def _prepare(make_builder: Callable[[], tfds.core.DatasetBuilder], folder: Path) -> None:
    """Has TFDS write the dataset under `folder` unless it is there."""
    require_main_guard()  # Such a process would wait for ever for its parent's lock.
    try:
        with locked(folder / "lock", wait=True):
            builder = make_builder()
            if builder.data_path.exists():
                return
            for leftover in folder.glob("*/*incomplete*"):  # Of a killed process.
                shutil.rmtree(leftover)
            tfds.disable_progress_bar()
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself there.
                builder.download_and_prepare()
    except concurrent.futures.process.BrokenProcessPool:
        raise InputError(
            f"the workers that make the phantoms ended early: {MISSING_GUARD}"
        ) from None
    except OSError as error:
        check_temporary_files()  # TFDS makes some.
        raise InputError(
            f"can't write the prepared dataset to {folder} ({error}): choose another folder as "
            "--data.cache-dir"
        ) from None
