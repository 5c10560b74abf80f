"""`fetal-flax evaluate`: a network's masks against annotated ones, at native size."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fetal_flax._util.console import track
from fetal_flax._util.files import csv_bytes, growing_csv
from fetal_flax._util.pipeline import map_in_threads
from fetal_flax.checkpoints import Checkpoint, Description, load_checkpoint, locate, shipped
from fetal_flax.config import DataConfig, TestTimeAugmentation, from_dict, to_dict
from fetal_flax.data import hc18, splits
from fetal_flax.data.datasets import Dataset, Record, open_dataset
from fetal_flax.data.images import read_gray
from fetal_flax.errors import InputError
from fetal_flax.inference.assessment import Measurement
from fetal_flax.inference.segmenter import Segmenter
from fetal_flax.measurement.ellipse_overlap import ellipse_metrics
from fetal_flax.measurement.gestational_age import trimester
from fetal_flax.measurement.head import OUTLINE_PX, Head, largest_region
from fetal_flax.measurement.overlap import segmentation_metrics
from fetal_flax.measurement.surface import surface_distances
from fetal_flax.reporting import pictures
from fetal_flax.reporting.html import WORST_CASES, WorstCase, write_report
from fetal_flax.reporting.tables import (
    PER_IMAGE,
    Row,
    cells,
    header,
    summarize,
    write_mask,
    write_metrics,
)

SplitName = Literal["train", "validation", "all"]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A network's results on images of a data set."""

    dataset: Dataset
    indices: Sequence[int]
    """Of the images in the data set."""
    rows: Sequence[Row]
    """One for each of `indices`."""
    heads: Sequence[Head | None]
    """What was measured in each mask."""
    settings: Mapping[str, Any]
    """What was evaluated, as JSON values."""

    @property
    def run(self) -> dict[str, Any]:
        """The settings, and the names of the images in which no head was found."""
        heads = zip(self.rows, self.heads, strict=True)
        return {**self.settings, "missed": [row.name for row, head in heads if head is None]}


def evaluate(
    checkpoint: Path | str | Checkpoint,
    data_dir: Path | str | None = None,
    *,
    output: Path | str | None = None,
    split: SplitName = "all",
    tta: TestTimeAugmentation = "none",
    workers: int | None = None,
) -> dict[str, Any]:
    """Segments annotated images and measures how well ellipses, masks and circumferences match.

    With `output`, writes `masks/NAME.png` (native size, 0 or 255), `per_image.csv`, `metrics.json`
    and `report.html`, and overwrites files of these names. In `metrics.json`, `run` says what was
    evaluated. A head that was missed counts with the worst value of every metric (a circumference
    of 0) and is listed.

    Args:
        checkpoint: Training workdir, converted directory, a shipped network's name, or what
            `load_checkpoint` returned.
        data_dir: HC18 folder; None takes the data set that the checkpoint was trained with.
        output: Folder for the results, created if needed; None writes nothing.
        split: Which side of the training run's own split; `all` includes the images that the
            network was trained with, where the run had them.
        tta: `flip` averages the probabilities with those of the mirror image.
        workers: Threads for each of reading, measuring and writing; None takes one for each
            processor, at most 16.

    Returns:
        What `metrics.json` holds: `n`; of each metric `mean`, `std`, `median` and `ci95`, such as
        `dice`, `hausdorff_mm`, `hc_error_mm` and `ellipse_dice` (docs/measurement.md says what
        they are); the same by trimester; and `run`.

    Raises:
        InputError: `checkpoint` holds no network, or has no `split.json`, or was trained on all
            images, where a side of the split is asked for; the data set isn't given, can't be used
            or lacks images of the split; or a result can't be written.

    Example:
        >>> metrics = ff.evaluate("runs/hc18", "HC18")
        >>> metrics["n"], metrics["dice"]["mean"] > 0.98, metrics["run"]["missed"]
        (2, True, [])
    """
    measured = measure(checkpoint, data_dir, output=output, split=split, tta=tta, workers=workers)
    if output is None:
        return summarize(measured.rows, run=measured.run)
    curves = [] if isinstance(checkpoint, Checkpoint) else [locate(checkpoint) / "curves.png"]
    return write_results(output, measured, curves=[path for path in curves if path.is_file()])


def measure(
    checkpoint: Path | str | Checkpoint,
    data_dir: Path | str | None = None,
    *,
    output: Path | str | None = None,
    split: SplitName = "all",
    tta: TestTimeAugmentation = "none",
    workers: int | None = None,
) -> Measured:
    """Writes the masks and returns the rest: `evaluate` without the summary.

    The arguments and errors are those of `evaluate`.
    """
    if isinstance(checkpoint, Checkpoint):
        loaded, folder, name = checkpoint, None, checkpoint.metadata.title
    else:
        loaded, folder, name = load_checkpoint(checkpoint), locate(checkpoint), str(checkpoint)
    description = loaded.metadata
    if split != "all":
        _check_has_split(folder, description, split)
    data, seed = _data_settings(name, description, data_dir)
    dataset = open_dataset(data, seed)
    indices = range(len(dataset)) if folder is None else _indices(folder, dataset, split)

    contradictions: list[str] = []

    def compare(pair: tuple[Record, Measurement]) -> tuple[Row, Head | None]:
        record, measurement = pair
        if data.dataset == "hc18" and (
            wrong := hc18.contradiction(
                record.mask > 0, record.pixel_size_mm, record.head_circumference_mm
            )
        ):
            contradictions.append(f"{record.name} {wrong}")
        if output is not None:
            write_mask(Path(output) / "masks" / f"{record.name}.png", measurement.mask)
        return _row(record, measurement), measurement.head

    measured = Segmenter(loaded, tta=tta, workers=workers).measure_each(
        map_in_threads(dataset.record, track(indices, "Evaluating"), workers),
        lambda record: record.image,
        lambda record: record.pixel_size_mm,
        assess_views=False,
    )
    compared = list(_kept(map_in_threads(compare, measured, workers), output))
    if contradictions:
        hc18.warn_of_contradictions(data.data_dir, sorted(contradictions))
    settings = {
        "checkpoint": name,
        "epoch": _epoch(description),
        "split": split,
        "dataset": data.dataset,
        "data_dir": data.data_dir,
        "image_size": list(description.image_size),
        "tta": tta,
        "outline_px": OUTLINE_PX[description.dataset],
        "model": to_dict(description.model),
    }
    rows, heads = [row for row, _ in compared], [head for _, head in compared]
    return Measured(dataset, indices, rows, heads, settings)


def _kept(
    compared: Iterable[tuple[Row, Head | None]], output: Path | str | None
) -> Iterator[tuple[Row, Head | None]]:
    """Yields what was compared, each row in `per_image.csv` by then, whatever comes next."""
    if output is None:
        yield from compared
        return
    for stale in ("metrics.json", "report.html"):
        with contextlib.suppress(OSError):  # What can't be written is said when it is written.
            (Path(output) / stale).unlink()
    with contextlib.ExitStack() as stack:
        table, columns = None, []
        for row, head in compared:
            if table is None:
                columns = header(row)
                table = stack.enter_context(growing_csv(Path(output) / PER_IMAGE, columns))
            table.add(csv_bytes([cells(row, columns)]))
            yield row, head


def write_results(
    output: Path | str, measured: Measured, *, curves: Sequence[Path] = ()
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
    output, rows = Path(output), measured.rows
    metrics = write_metrics(output, rows, run=measured.run)
    cases = _worst_cases(output, measured)
    pictures_of_curves = [path.read_bytes() for path in curves]
    write_report(output / "report.html", metrics, rows, cases, curves=pictures_of_curves)
    return metrics


def _row(record: Record, measurement: Measurement) -> Row:
    """Returns how well a measurement matches the annotation of its image."""
    mask, head = measurement.mask, measurement.head
    truth, pixel_size, reference = (
        record.mask > 0,
        record.pixel_size_mm,
        record.head_circumference_mm,
    )
    circumference = measurement.hc_mm or 0.0
    error = circumference - reference
    return Row(
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
            "confidence": measurement.quality.confidence,
            "flags": " ".join(measurement.flags),
        },
    )


def _worst_cases(output: Path, measured: Measured) -> list[WorstCase]:
    """Draws the images whose ellipse has the lowest Dice, with the masks that were written."""
    images = zip(measured.indices, measured.rows, measured.heads, strict=True)
    worst = sorted(images, key=lambda image: image[1].metrics["ellipse_dice"])[:WORST_CASES]
    cases: list[WorstCase] = []
    for index, row, head in worst:
        record = measured.dataset.record(index)
        mask = read_gray(output / "masks" / f"{record.name}.png") > 0
        picture = pictures.overlay(record.image, prediction=mask, truth=record.mask > 0)
        if head:
            picture = pictures.draw_ellipse(picture, head.edge_ellipse)
        cases.append(WorstCase(row, picture))
    return cases


def _check_has_split(folder: Path | None, description: Description, split: str) -> None:
    if folder is None:
        raise InputError(
            f"a checkpoint in memory has no split.json, so it has no {split} images: give its "
            'folder, or take split="all"'
        )
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
    checkpoint: str, description: Description, data_dir: Path | str | None
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
    try:
        sides = splits.read_manifest(folder / shipped.SPLIT, dataset.names)
    except InputError as error:
        raise InputError(
            f"{error}: take --split all, or give the data that it was made from as --data-dir"
        ) from None
    return sides.train if split == "train" else sides.validation


def _epoch(description: Description) -> int | None:
    """Returns the epoch of a run's checkpoint; a converted one has none."""
    history = description.progress.get("history")
    return history[-1]["epoch"] if history else None
