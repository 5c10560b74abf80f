"""A training run, from its config to its workdir, told from top to bottom.

A run that was stopped at any moment, even by SIGKILL, goes on with `resume` and ends as it would
have ended, to the bit: what a step computes depends on the state and on (seed, step) alone.
"""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fetal_flax import checkpoints
from fetal_flax.checkpoints import TrainingCheckpoints
from fetal_flax.config import TrainConfig
from fetal_flax.training.compile import create_state
from fetal_flax.training.distributed import is_first, run_on_all_processes
from fetal_flax.training.epoch import train_epochs
from fetal_flax.training.events import Listener, Message
from fetal_flax.training.interruption import Interruption
from fetal_flax.training.logging.console import Console
from fetal_flax.training.logging.files import LogFiles
from fetal_flax.training.logging.profiler import Profiler
from fetal_flax.training.session import RunProgress, TrainingSession, restored_state, training_of
from fetal_flax.training.setup import Setup, describe, prepare
from fetal_flax.training.sharding import check_devices
from fetal_flax.training.step import TrainState, network_of
from fetal_flax.training.workdir import (
    check_same_split,
    check_workdir,
    disk_failure_named,
    hold_workdir,
    write_start,
)

SHEET_IMAGES = 12
SCORES = {"dice": "Dice", "ellipse_dice": "Dice of the ellipse"}


def train(
    config: TrainConfig,
    workdir: Path | str,
    *,
    resume: bool = False,
    profile: bool = False,
    quiet: bool = False,
    listeners: Sequence[Listener] = (),
) -> RunProgress:
    """Trains to the last epoch or until validation no longer improves.

    Args:
        config: The run.
        workdir: Where everything goes; must hold no run yet, unless `resume`.
        resume: Go on where the run in `workdir` stopped.
        profile: Trace a few steps into `workdir`/profile.
        quiet: Print nothing.
        listeners: Who is told what happens (training/events.py), besides terminal and log files.

    Returns:
        The numbers of every epoch (`history`) and the best of them (`stopping`), as the workdir
        has them in `metrics.csv`; the network is there for `load` and `load_checkpoint`.

    Raises:
        InputError: Settings, files or data can't be used; the message says which.
        RunError: The run can't go on; the message says what is saved.
        Interrupted: SIGTERM or SIGINT came; the message says what is saved.

    Example:
        >>> progress = ff.train(config, "runs/small", quiet=True)
        >>> progress.epochs, 0 < progress.stopping.best < 1
        (1, True)
        >>> ff.load_checkpoint("runs/small").config == config.model
        True
    """
    workdir, config = Path(workdir), _with_absolute_folder(config)
    check_devices(config.model)
    with Interruption() as interruption, hold_workdir(workdir), contextlib.ExitStack() as stack:
        # Settle what never changes; nothing is written but caches.
        run_on_all_processes(lambda: check_workdir(config, workdir, resume=resume))
        setup = run_on_all_processes(lambda: prepare(config))
        console = Console(config.schedule.epochs, quiet=quiet or not is_first())
        console(Message(describe(setup)))

        with disk_failure_named(workdir), contextlib.ExitStack() as files:
            # Begin, or go on where the last whole checkpoint is.
            if not resume:
                # Before there are checkpoints, which nothing could go on from without it.
                run_on_all_processes(lambda: write_start(setup, workdir))
            saved = files.enter_context(contextlib.closing(TrainingCheckpoints(workdir)))
            state, progress = _begin(setup, workdir, saved, console, resume=resume)
            if resume:
                write_start(setup, workdir)

            # Say who is told what happens.
            heard_by = [console, *listeners]
            stack.enter_context(contextlib.closing(console))
            if is_first():
                logs = LogFiles(workdir, int(state.step), progress.history)
                heard_by.append(files.enter_context(contextlib.closing(logs)))
            if profile:
                profiler = Profiler(workdir / "profile")
                heard_by.append(files.enter_context(contextlib.closing(profiler)))

            # Train.
            session = TrainingSession(
                setup, workdir, state, progress, saved, interruption, heard_by
            )
            train_epochs(session)
            saved.wait()
        interruption.raise_at_once()

        # Show what has become of it.
        progress = session.progress
        if is_first():
            _write_curves(progress, workdir)
            write_validation_sheet(setup, workdir)
        best, score = progress.stopping, SCORES[config.schedule.select_by]
        console(
            Message(
                f"best validation {score} {best.best:.4f} in epoch {best.best_epoch}; curves.png, "
                f"validation.png, metrics.csv and checkpoints are in {workdir}"
            )
        )
    return progress


def _with_absolute_folder(config: TrainConfig) -> TrainConfig:
    """Returns settings whose data set is found from any working directory, also by `evaluate`."""
    folder = config.data.data_dir
    if folder is None or folder.startswith("~"):
        return config
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, data_dir=os.path.abspath(folder))
    )


def _begin(
    setup: Setup,
    workdir: Path,
    saved: TrainingCheckpoints,
    console: Console,
    *,
    resume: bool,
) -> tuple[TrainState, RunProgress]:
    """Returns where the run begins, or where it goes on."""
    state = create_state(setup.config, setup.variables, setup.mesh)
    restored = saved.restore_latest(network_of(state), training_of(state)) if resume else None
    if restored is None:
        return state, RunProgress()
    network, training, description, damages = restored
    for damage in damages:
        console(Message(f"{damage}; it is now in {workdir / checkpoints.DAMAGED}"))
    check_same_split(setup, workdir)
    progress = RunProgress.from_json(dict(description.progress))
    partial = len(progress.partial_epoch)
    steps = f" and {partial} steps of the next" if partial else ""
    console(Message(f"resuming behind epoch {progress.epochs}{steps}"))
    return restored_state(state, network, training), progress


def _write_curves(progress: RunProgress, workdir: Path) -> None:
    from fetal_flax.reporting import pictures  # Matplotlib: no start should wait for it.

    pictures.training_curves(workdir / "curves.png", progress.history)


def write_validation_sheet(setup: Setup, workdir: Path) -> None:
    """Draws validation images, from the worst ellipse to the best, with the best checkpoint."""
    from fetal_flax.inference.segmenter import load
    from fetal_flax.measurement.ellipse_overlap import ellipse_mask
    from fetal_flax.measurement.overlap import segmentation_metrics
    from fetal_flax.reporting import pictures

    records = [setup.dataset.record(i) for i in setup.split.validation]
    measured = load(workdir).measure_all(record.image for record in records)
    images = []
    for record, measurement in zip(records, measured, strict=True):
        mask, head, truth = measurement.mask, measurement.head, record.mask > 0
        images.append(
            pictures.SheetImage(
                record.name,
                record.image,
                mask,
                truth,
                head.edge_ellipse if head else None,
                segmentation_metrics(ellipse_mask(head, truth.shape), truth)["dice"],
                segmentation_metrics(mask, truth)["dice"],
            )
        )
    images.sort(key=lambda image: image.ellipse_dice)
    chosen = np.linspace(0, len(images) - 1, min(SHEET_IMAGES, len(images))).astype(int)
    pictures.overlay_sheet(workdir / "validation.png", [images[i] for i in chosen])
