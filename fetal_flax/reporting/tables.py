"""The files that an evaluation leaves behind: `metrics.json`, `per_image.csv` and masks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from fetal_flax._util.files import csv_bytes, json_bytes, write_atomically
from fetal_flax._util.png import encode_png
from fetal_flax.measurement.overlap import aggregate, check_mask

PER_IMAGE = "per_image.csv"
GROUPINGS = ("trimester", "fold")
"""Columns of `per_image.csv` whose values metrics.json has an aggregate of each."""


class Row(NamedTuple):
    """One annotated image, and how well the prediction matches."""

    name: str
    metrics: dict[str, float]
    """Numbers to be aggregated, such as `segmentation_metrics` returns."""
    columns: dict[str, Any]
    """What `per_image.csv` tells besides."""


def write_metrics(
    output_dir: str | Path, rows: Sequence[Row], *, run: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes `metrics.json` and `per_image.csv`, and returns what `metrics.json` holds.

    `metrics.json` is what `summarize` returns. `per_image.csv` has the columns `name`, one per
    metric, then the others; numbers are written with all their digits.

    Args:
        output_dir: Where the files go; created if needed.
        rows: The images, all with the same metrics and columns.
        run: What was evaluated, as JSON values: checkpoint, config, split.

    Raises:
        InputError: There are no images, or the files can't be written.
        ValueError: Rows differ in metrics or columns, a column repeats a metric's name, or a
            number is not finite, which JSON can't hold.
    """
    metrics = summarize(rows, run=run)
    columns = header(rows[0])
    if any(row.columns.keys() != rows[0].columns.keys() for row in rows):
        raise ValueError("every image must have the same columns")
    table = csv_bytes([columns, *(cells(row, columns) for row in rows)])
    files = {PER_IMAGE: table, "metrics.json": json_bytes(metrics)}
    for name, content in files.items():
        write_atomically(Path(output_dir) / name, content)
    return metrics


def header(row: Row) -> list[str]:
    """Returns the columns of `per_image.csv`.

    Raises:
        ValueError: A column repeats a metric's name.
    """
    columns = ["name", *row.metrics, *row.columns]
    if len(set(columns)) != len(columns):
        raise ValueError(f"{PER_IMAGE} has a column twice: {', '.join(columns)}")
    return columns


def cells(row: Row, columns: Sequence[str]) -> list[Any]:
    """Returns a row's values in the order of the columns."""
    values = {"name": row.name} | row.metrics | row.columns
    return [values[name] for name in columns]


def summarize(rows: Sequence[Row], *, run: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `aggregate` of all images (`n`, `dice.mean`, `dice.std`, ...) and of groups.

    Beside it stand `by`, the same for the images of each trimester and fold where there are such
    columns, and `run`.

    Args:
        rows: The images, all with the same metrics.
        run: What was evaluated, as JSON values: checkpoint, config, split.

    Raises:
        InputError: There are no images.
        ValueError: Rows differ in metrics.
    """
    metrics = aggregate([row.metrics for row in rows])
    return metrics | {"by": _by_group(rows), "run": dict(run)}


def _by_group(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns an aggregate for each value of each of the `GROUPINGS`, values in order."""
    groups: dict[str, Any] = {}
    for column in GROUPINGS:
        values = {str(row.columns[column]) for row in rows if column in row.columns}
        for value in sorted(values):
            members = [row.metrics for row in rows if str(row.columns[column]) == value]
            groups.setdefault(column, {})[value] = aggregate(members)
    return groups


def write_mask(path: str | Path, mask: Bool[np.ndarray, "height width"]) -> None:
    """Writes a mask as an 8-bit grey PNG of its own size: 255 inside, 0 outside.

    Args:
        path: The file, `masks/NAME.png`; its folder is created if needed.
        mask: True inside the head.

    Raises:
        InputError: The file can't be written.
        ValueError: The mask is not boolean or not 2-D.
    """
    check_mask(mask)
    write_atomically(path, encode_png(mask.astype(np.uint8) * 255))
