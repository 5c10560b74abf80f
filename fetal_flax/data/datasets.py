"""HC18 and the phantoms as TFDS datasets: prepared once, then read at random.

A prepared dataset is a directory under the cache that TFDS wrote whole or not at all. Reading
needs no TensorFlow: records come from ArrayRecord files, images as the PNG bytes they were
stored as.
"""

import concurrent.futures.process
import contextlib
import dataclasses
import functools
import io
import multiprocessing
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from fetal_flax._util.console import track
from fetal_flax._util.files import locked
from fetal_flax._util.machine import (
    MISSING_GUARD,
    available_cpus,
    can_start_workers,
    require_main_guard,
    start_worker,
)
from fetal_flax.config import DataConfig
from fetal_flax.data import hc18
from fetal_flax.data.images import decode_gray, encode_png
from fetal_flax.errors import InputError

_SPLIT = "train"  # TFDS reserves "all"; the split into training and validation is splits.py's.
_PHANTOMS_PER_WORKER = 32  # Fewer don't repay the start of a worker process.


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
        InputError: HC18 is neither given nor downloadable, its files have problems, or the cache
            can't be written.
    """
    cache = Path(config.cache_dir).expanduser()
    if config.dataset == "fetal_phantom":
        height, width = config.phantom_size
        folder = cache / "datasets" / f"phantom-{height}x{width}-{config.phantom_count}-{seed}"
        builder = functools.partial(
            FetalPhantom, count=config.phantom_count, size=config.phantom_size, seed=seed
        )
    else:
        source = Path(config.data_dir).expanduser() if config.data_dir else hc18.download(cache)
        # Another folder, or the same after a change, is another dataset.
        folder = cache / "datasets" / f"hc18-{hc18.fingerprint(source)}"
        builder = functools.partial(Hc18, source=source)
    make_builder = functools.partial(builder, data_dir=folder, file_format="array_record")
    _prepare(make_builder, folder)
    prepared: Any = make_builder()
    stored = {name: tfds.decode.SkipDecoding() for name in ("image", "mask")}
    records = prepared.as_data_source(split=_SPLIT, decoders=stored)
    return Dataset(records, folder=Path(prepared.data_path), **prepared.info.metadata)


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What both datasets share: their features, and names and examinations as metadata."""

    def _info(self) -> tfds.core.DatasetInfo:
        png = functools.partial(
            tfds.features.Image, shape=(None, None, 1), dtype=np.uint8, encoding_format="png"
        )
        # As a plain feature a float64 would be stored as a float32.
        number = functools.partial(
            tfds.features.Tensor, shape=(), dtype=np.float64, encoding=tfds.features.Encoding.BYTES
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": png(doc="Native size."),
                    "mask": png(doc="Native size, 255 in the head, 0 outside."),
                    "pixel_size_mm": number(),
                    "head_circumference_mm": number(),
                    "examination": tfds.features.Text(),
                    "name": tfds.features.Text(),
                }
            ),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # Records stay in the order of their names.
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # Nothing is downloaded through TFDS.
        return {_SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        metadata: Any = self.info.metadata
        metadata.update(names=[], examinations=[])
        for index, example in enumerate(self._examples()):
            metadata["names"].append(example["name"])
            metadata["examinations"].append(example["examination"])
            yield index, example

    def _examples(self) -> Iterable[dict[str, Any]]:
        """Yields the features of each record, in the order of their names."""
        raise NotImplementedError


class Hc18(_Builder):
    """HC18: ultrasound images of fetal heads with the head as a filled mask."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, source: Path | None = None, **kwargs: Any) -> None:
        self._source = source
        super().__init__(**kwargs)

    def _examples(self) -> Iterator[dict[str, Any]]:
        assert self._source is not None, "preparing HC18 needs its folder"
        records = hc18.find_records(self._source)
        with concurrent.futures.ThreadPoolExecutor(available_cpus()) as pool:
            yield from track(pool.map(_hc18_example, records), "Preparing HC18", len(records))


class FetalPhantom(_Builder):
    """Procedural phantoms: ultrasound-like images of a fetal head with its exact mask."""

    VERSION = tfds.core.Version("1.0.0")  # Raise it when make_phantom draws other images.

    def __init__(
        self, *, count: int = 0, size: tuple[int, int] = (0, 0), seed: int = 0, **kwargs: Any
    ) -> None:
        self._count, self._size, self._seed = count, size, seed
        super().__init__(**kwargs)

    def _examples(self) -> Iterator[dict[str, Any]]:
        make = functools.partial(_phantom_example, self._seed, self._size)
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


def _hc18_example(record: hc18.HC18Record) -> dict[str, Any]:
    image, mask = hc18.load(record)
    return {
        "image": encode_png(image),
        "mask": encode_png(mask),
        "pixel_size_mm": np.float64(record.pixel_size_mm),
        "head_circumference_mm": np.float64(record.head_circumference_mm),
        "examination": record.examination,
        "name": record.name,
    }


def _phantom_example(seed: int, size: tuple[int, int], index: int) -> dict[str, Any]:
    from fetal_flax.data.phantom import make_phantom  # SciPy: needed once.

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
        raise InputError(f"can't write the prepared dataset to {folder}: {error}") from None
