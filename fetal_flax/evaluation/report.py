"""The files that an evaluation leaves behind: `metrics.json`, `per_image.csv` and masks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool

from fetal_flax.evaluation.metrics import aggregate
from fetal_flax.files import csv_bytes, json_bytes, write_atomically


def write_metrics(
    output_dir: str | Path,
    names: Sequence[str],
    per_image: Sequence[Mapping[str, float]],
    *,
    columns: Mapping[str, Sequence[object]] | None = None,
    run: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes `metrics.json` and `per_image.csv`, and returns what `metrics.json` holds.

    `metrics.json` is `aggregate(per_image)` (`n`, `dice.mean`, `dice.std`, ...) with `run` beside
    it. `per_image.csv` has the columns `name`, one per metric, then `columns`; numbers are written
    with all their digits.

    Args:
        output_dir: Where the files go; created if needed.
        names: One image name per entry of `per_image`.
        per_image: The metrics of each image, such as `segmentation_metrics` returns.
        columns: Further columns of `per_image.csv`, one value per image.
        run: What was evaluated, as JSON values: checkpoint, config, split.

    Raises:
        InputError: There are no images, or the files can't be written.
        ValueError: `names`, `per_image` and `columns` differ in length or in metrics, a column
            repeats a metric's name, or a number is not finite, which JSON can't hold.
    """
    columns = columns or {}
    metrics = aggregate(per_image) | {"run": dict(run or {})}
    header = ["name", *per_image[0], *columns]
    if len(set(header)) != len(header):
        raise ValueError(f"per_image.csv has a column twice: {', '.join(header)}")
    rows = [
        [name, *(values[metric] for metric in per_image[0]), *others]
        for name, values, *others in zip(names, per_image, *columns.values(), strict=True)
    ]
    files = {"per_image.csv": csv_bytes([header, *rows]), "metrics.json": json_bytes(metrics)}
    for name, content in files.items():
        write_atomically(Path(output_dir) / name, content)
    return metrics


def write_mask(path: str | Path, mask: Bool[np.ndarray, "height width"]) -> None:
    """Writes a mask as an 8-bit grey PNG of its own size: 255 inside, 0 outside.

    Args:
        path: The file, `masks/NAME.png`; its folder is created if needed.
        mask: True inside the head.

    Raises:
        InputError: The file can't be written.
        ValueError: The mask is not boolean or not 2-D.
    """
    if mask.dtype != np.bool_ or mask.ndim != 2:
        raise ValueError(f"a mask must be 2-D and boolean, not {mask.dtype} {mask.shape}")
    _, png = cv2.imencode(".png", mask.astype(np.uint8) * 255)
    write_atomically(path, png.tobytes())
