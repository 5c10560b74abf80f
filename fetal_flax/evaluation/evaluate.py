"""`fetal-flax evaluate`: a network's masks against annotated ones, at native size."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fetal_flax import checkpoints
from fetal_flax._util.console import track
from fetal_flax.checkpoints import Description, shipped
from fetal_flax.config import DataConfig, TestTimeAugmentation, from_dict, to_dict
from fetal_flax.data import splits
from fetal_flax.data.datasets import Dataset, Record, open_dataset
from fetal_flax.data.images import read_gray
from fetal_flax.errors import InputError
from fetal_flax.inference.assessment import assess
from fetal_flax.inference.segmenter import (
    Predictor,
    Views,
    mean_logits,
)
from fetal_flax.measurement.ellipse_overlap import ellipse_metrics
from fetal_flax.measurement.gestational_age import trimester
from fetal_flax.measurement.head import OUTLINE_PX, Head, largest_region
from fetal_flax.measurement.overlap import segmentation_metrics
from fetal_flax.measurement.surface import surface_distances
from fetal_flax.reporting import pictures
from fetal_flax.reporting.html import WORST_CASES, WorstCase, write_report
from fetal_flax.reporting.tables import Row, write_mask, write_metrics

SplitName = Literal["train", "validation", "all"]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A network's results on images of a data set; their masks are written."""

    dataset: Dataset
    indices: Sequence[int]
    """Of the images in the data set."""
    rows: Sequence[Row]
    """One for each of `indices`."""
    heads: Sequence[Head | None]
    """What was measured in each mask."""
    run: Mapping[str, Any]
    """What was evaluated, as JSON values."""


def evaluate(
    checkpoint: Path,
    output: Path,
    *,
    data_dir: Path | None = None,
    split: SplitName = "all",
    tta: TestTimeAugmentation = "none",
) -> dict[str, Any]:
    """Segments annotated images and measures how well ellipses, masks and circumferences match.

    Writes `masks/NAME.png` (native size, 0 or 255), `per_image.csv`, `metrics.json` and
    `report.html`, and overwrites files of these names. In `metrics.json`, `run` says what was
    evaluated. A head that was missed counts with the worst value of every metric (a circumference
    of 0) and is listed.

    Args:
        checkpoint: Training workdir, converted directory, or a shipped network's name.
        output: Folder for the results; created if needed.
        data_dir: HC18 folder; None takes the data set that the checkpoint was trained with.
        split: Which side of the training run's own split; `all` includes the images that the
            network was trained with, where the run had them.
        tta: `flip` averages the probabilities with those of the mirror image.

    Returns:
        What `metrics.json` holds.

    Raises:
        InputError: `checkpoint` holds no network, or has no `split.json`, or was trained on all
            images, where a side of the split is asked for; the data set isn't given, can't be used
            or lacks images of the split; or a result can't be written.
    """
    measured = measure(checkpoint, output, data_dir=data_dir, split=split, tta=tta)
    curves = checkpoints.locate(checkpoint) / "curves.png"
    return write_results(output, measured, curves=[curves] if curves.is_file() else [])


def measure(
    checkpoint: Path,
    output: Path,
    *,
    data_dir: Path | None = None,
    split: SplitName = "all",
    tta: TestTimeAugmentation = "none",
) -> Measured:
    """Writes the masks and returns the rest: `evaluate` without the summary.

    The arguments and errors are those of `evaluate`.
    """
    variables, description = checkpoints.load(checkpoint)
    folder = checkpoints.locate(checkpoint)
    if split != "all":
        _check_has_split(folder, description, split)
    data, seed = _data_settings(checkpoint, description, data_dir)
    dataset = open_dataset(data, seed)
    indices = _indices(folder, dataset, split)
    predictor = Predictor(description.model, variables, description.image_size, tta=tta)
    outline_px = OUTLINE_PX[description.dataset]
    rows, heads = [], []
    records = map(dataset.record, track(indices, "Evaluating"))
    for record, views in predictor.segment(records, lambda record: record.image):
        row, head = _measure_record(output, record, views, outline_px)
        rows.append(row)
        heads.append(head)
    run = {
        "checkpoint": str(checkpoint),
        "epoch": _epoch(description),
        "split": split,
        "dataset": data.dataset,
        "data_dir": data.data_dir,
        "image_size": list(description.image_size),
        "tta": tta,
        "outline_px": outline_px,
        "model": to_dict(description.model),
    }
    return Measured(dataset, indices, rows, heads, run)


def write_results(
    output: Path, measured: Measured, *, curves: Sequence[Path] = ()
) -> dict[str, Any]:
    """Writes `metrics.json`, `per_image.csv` and `report.html` beside the masks.

    Args:
        output: The folder that `measure` wrote the masks to.
        measured: What it returned.
        curves: PNG files with training curves to show.

    Returns:
        What `metrics.json` holds.

    Raises:
        InputError: There are no images, or a file can't be written.
    """
    rows = measured.rows
    missed = [row.name for row, head in zip(rows, measured.heads, strict=True) if head is None]
    metrics = write_metrics(output, rows, run={**measured.run, "missed": missed})
    cases = _worst_cases(output, measured)
    pictures_of_curves = [path.read_bytes() for path in curves]
    write_report(output / "report.html", metrics, rows, cases, curves=pictures_of_curves)
    return metrics


def _measure_record(
    output: Path, record: Record, views: Views, outline_px: float
) -> tuple[Row, Head | None]:
    """Writes one image's mask and returns its row and the head that was found."""
    mask, head, quality = assess(mean_logits(views), record.image.shape, outline_px=outline_px)
    write_mask(output / "masks" / f"{record.name}.png", mask)
    truth, pixel_size, reference = (
        record.mask > 0,
        record.pixel_size_mm,
        record.head_circumference_mm,
    )
    circumference = head.in_mm(pixel_size).circumference if head else 0.0
    error = circumference - reference
    row = Row(
        record.name,
        ellipse_metrics(head, truth, pixel_size)
        | {"hc_error_mm": error, "hc_abs_error_mm": abs(error)}
        | segmentation_metrics(mask, truth)
        | surface_distances(mask, truth, pixel_size),
        {
            "hc_mm": circumference,
            "hc_reference_mm": reference,
            "pixel_size_mm": pixel_size,
            "trimester": trimester(reference),
            "touches_border": bool(head and head.touches_border),
            "components": head.components if head else largest_region(mask)[1],
            "ellipse_agreement": head.ellipse_agreement if head else 0.0,
            "confidence": quality.confidence,
            "flags": " ".join(quality.flags),
        },
    )
    return row, head


def _worst_cases(output: Path, measured: Measured) -> list[WorstCase]:
    """Draws the images whose ellipse has the lowest Dice, with the masks that were written."""
    images = zip(measured.indices, measured.rows, measured.heads, strict=True)
    worst = sorted(images, key=lambda image: image[1].metrics["ellipse_dice"])[:WORST_CASES]
    cases = []
    for index, row, head in worst:
        record = measured.dataset.record(index)
        mask = read_gray(output / "masks" / f"{record.name}.png") > 0
        picture = pictures.overlay(record.image, prediction=mask, truth=record.mask > 0)
        if head:
            picture = pictures.draw_ellipse(picture, head.edge_ellipse)
        cases.append(WorstCase(row, picture))
    return cases


def _check_has_split(folder: Path, description: Description, split: str) -> None:
    if description.progress.get(shipped.TRAINED_ON) == shipped.ALL_IMAGES:
        raise InputError(
            f"{folder} was trained on all images and left none out, so it has no {split} images "
            "(its card says which its figures are of): take --split all"
        )
    if not (folder / shipped.SPLIT).is_file():
        raise InputError(
            f"{folder} has no split.json, so it has no {split} images: take --split all, or "
            "a training workdir"
        )


def _data_settings(
    checkpoint: Path, description: Description, data_dir: Path | None
) -> tuple[DataConfig, int]:
    """Returns the data settings and the seed that phantoms are drawn with."""
    config = description.config
    if config is None and data_dir is None:
        raise InputError(
            f"{checkpoint} was not trained here and names no data set: give an HC18 folder as "
            "--data-dir"
        )
    data = DataConfig() if config is None else from_dict(DataConfig, config["data"], path="data")
    if data_dir is not None:
        data = dataclasses.replace(data, dataset="hc18", data_dir=str(data_dir))
    return data, 0 if config is None else config["seed"]


def _indices(folder: Path, dataset: Dataset, split: SplitName) -> Sequence[int]:
    if split == "all":
        return range(len(dataset))
    sides = splits.read_manifest(folder / shipped.SPLIT, dataset.names)
    return sides.train if split == "train" else sides.validation


def _epoch(description: Description) -> int | None:
    """Returns the epoch of a run's checkpoint; a converted one has none."""
    history = description.progress.get("history")
    return history[-1]["epoch"] if history else None
