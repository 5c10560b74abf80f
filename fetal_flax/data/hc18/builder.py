"""HC18 as a TFDS dataset."""

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fetal_flax._util.console import track
from fetal_flax._util.machine import available_cpus
from fetal_flax._util.png import encode_png
from fetal_flax.data.builder import Builder
from fetal_flax.data.hc18.folder import HC18Record, find_records, load


class Hc18(Builder):
    """HC18: ultrasound images of fetal heads with the head as a filled mask."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, source: Path | None = None, **kwargs: Any) -> None:
        self._source = source
        super().__init__(**kwargs)

    def _examples(self) -> Iterator[dict[str, Any]]:
        assert self._source is not None, "preparing HC18 needs its folder"
        records = find_records(self._source)
        with concurrent.futures.ThreadPoolExecutor(available_cpus()) as pool:
            yield from track(pool.map(_example, records), "Preparing HC18", len(records))


def _example(record: HC18Record) -> dict[str, Any]:
    image, mask = load(record)
    return {
        "image": encode_png(image),
        "mask": encode_png(mask),
        "pixel_size_mm": np.float64(record.pixel_size_mm),
        "head_circumference_mm": np.float64(record.head_circumference_mm),
        "examination": record.examination,
        "name": record.name,
    }
