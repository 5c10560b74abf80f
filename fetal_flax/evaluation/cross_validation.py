"""K-fold cross-validation: every image is held out once, by a network that never saw it.

WORKDIR/fold-K/              a training run for each fold, as `train --fold K` leaves it
WORKDIR/masks/, per_image.csv, metrics.json, report.html    all folds together
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fetal_flax.config import TrainConfig
from fetal_flax.evaluation.evaluate import Measured, measure, write_results
from fetal_flax.training.run import train

DEFAULT_FOLDS = 5


def cross_validate(config: TrainConfig, workdir: Path) -> dict[str, Any]:
    """Trains every fold, then measures each network on the images that it was not trained with.

    A fold that is done is not trained again, and one that was interrupted is resumed. The epoch
    of each network is the one that validated best on the same images, which flatters a little.

    Args:
        config: The run; `data.folds` says how many folds, 0 is `DEFAULT_FOLDS`.
        workdir: Where everything goes.

    Returns:
        What `metrics.json` holds: all images together, and under `by.fold` each fold's.

    Raises:
        InputError: As `train` and `evaluate`; a fold in `workdir` has another config.
    """
    folds = range(config.data.folds or DEFAULT_FOLDS)
    runs = [fold_folder(workdir, fold) for fold in folds]
    for fold, run in zip(folds, runs, strict=True):
        train(with_fold(config, fold), run, resume=(run / "config.json").exists())
    measured = _joined(workdir, [measure(run, output=workdir, split="validation") for run in runs])
    return write_results(workdir, measured, curves=[run / "curves.png" for run in runs])


def with_fold(config: TrainConfig, fold: int) -> TrainConfig:
    """Returns the settings of one fold's run.

    Raises:
        InputError: There is no such fold.
    """
    folds = config.data.folds or DEFAULT_FOLDS
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, folds=folds, fold=fold)
    )


def default_workdir(config: TrainConfig) -> Path:
    """Returns where a cross-validation goes if nothing else is said."""
    return Path("runs", f"{config.name}-folds")


def fold_folder(workdir: Path, fold: int) -> Path:
    """Returns the workdir of one fold's run."""
    return workdir / f"fold-{fold}"


def _joined(workdir: Path, folds: Sequence[Measured]) -> Measured:
    """Returns the folds as one evaluation, with a column that says which image is whose."""
    rows = [
        row._replace(columns=row.columns | {"fold": fold})
        for fold, measured in enumerate(folds)
        for row in measured.rows
    ]
    return Measured(
        dataset=folds[0].dataset,
        indices=[index for measured in folds for index in measured.indices],
        rows=rows,
        heads=[head for measured in folds for head in measured.heads],
        settings={
            **folds[0].settings,
            "checkpoint": str(workdir),
            "epoch": [measured.settings["epoch"] for measured in folds],
            "split": f"each of {len(folds)} folds",
        },
    )
