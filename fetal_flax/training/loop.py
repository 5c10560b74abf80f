"""A training run from its config to its workdir.

WORKDIR/config.json          the whole config
WORKDIR/split.json           which image is on which side
WORKDIR/run.json             what was found out at the start: pos_weight, versions, devices
WORKDIR/checkpoints/         the last two epochs and the best; where the run was interrupted
WORKDIR/metrics.csv          a row per epoch; tensorboard/ has the same and every step
WORKDIR/curves.png           loss, Dice and learning rate over the epochs
WORKDIR/validation.png       validation images with the outlines of truth, prediction and ellipse
WORKDIR/profile/             traces of a few steps, with --profile
WORKDIR/non_finite/          the batch that stopped the run, where one did
WORKDIR/damaged/             checkpoints that could not be read, where a run resumed before them
WORKDIR/.lock                held while a training runs

A run that was stopped at any moment, even by SIGKILL, goes on with `resume` and ends as it would
have ended, to the bit: what a step computes depends on the state and on (seed, step) alone.
"""

import contextlib
import json
import platform
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from fetal_flax import checkpoints
from fetal_flax.checkpoints import TrainingCheckpoints
from fetal_flax.config import TrainConfig, from_dict, to_dict
from fetal_flax.data import splits
from fetal_flax.errors import InputError, RunError
from fetal_flax.files import json_bytes, locked, write_atomically
from fetal_flax.training.distributed import everywhere, is_first
from fetal_flax.training.epochs import Progressed, Underway, train_epochs, training_of, variables_of
from fetal_flax.training.interruption import Interruption
from fetal_flax.training.preparation import Run, describe, prepare, split_method
from fetal_flax.training.progress import Logs, Progress
from fetal_flax.training.step import TrainState, create_state

SHEET_IMAGES = 12
# Settings that may change when a run is resumed: they don't change what a step computes.
RESUMABLE = (
    "schedule.epochs",
    "schedule.non_finite",
    "data.workers",
    "data.prefetch",
    "data.keep_validation_mb",
    "data.steps_per_dispatch",
    "data.cache_dir",
    "data.data_dir",
)


def train(
    config: TrainConfig, workdir: Path, *, resume: bool = False, profile: bool = False
) -> Path:
    """Trains to the last epoch or until validation Dice stops rising.

    Args:
        config: The run.
        workdir: Where everything goes; must hold no run yet, unless `resume`.
        resume: Go on where the run in `workdir` stopped.
        profile: Trace a few steps into `workdir`/profile.

    Returns:
        `workdir`.

    Raises:
        InputError: Settings, files or data can't be used; the message says which.
        RunError: The run can't go on; the message says what is saved.
        Interrupted: SIGTERM or SIGINT came; the message says what is saved.
    """
    with Interruption() as interruption, _held(workdir):
        everywhere(lambda: check_workdir(config, workdir, resume=resume))
        run = everywhere(lambda: prepare(config))
        progress = Progress(config.schedule.epochs, quiet=not is_first())
        progress.say(describe(run))
        with _disk_failure_named(workdir), contextlib.ExitStack() as stack:
            if not resume:
                # Before there are checkpoints, which nothing could go on from without it.
                everywhere(lambda: _write_start(run, workdir))
            saved = stack.enter_context(contextlib.closing(TrainingCheckpoints(workdir)))
            state, done = _start(run, workdir, saved, progress, resume=resume)
            logs = None
            if resume:
                _write_start(run, workdir)
            if is_first():
                logs = Logs(workdir, int(state.step), done.history)
                stack.enter_context(contextlib.closing(logs))
            underway = Underway(run, workdir, state, done, saved, logs, progress, interruption)
            train_epochs(underway, workdir / "profile" if profile else None)
            saved.wait()
        interruption.raise_at_once()
        done = underway.done
        if is_first():
            _write_curves(done, workdir)
            _write_sheet(run, workdir)
        progress.say(
            f"best validation Dice {done.stopping.best:.4f} in epoch {done.stopping.best_epoch}; "
            f"curves.png, validation.png, metrics.csv and checkpoints are in {workdir}"
        )
    return workdir


@contextlib.contextmanager
def _held(workdir: Path) -> Iterator[None]:
    """Keeps other trainings out of `workdir`, and leaves no folder that nothing was written to."""
    if not is_first():
        yield
        return
    lock = workdir / ".lock"
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(lock, wait=False))
        except OSError as error:
            raise InputError(
                f"can't write {workdir} ({error.strerror}): choose another --workdir"
            ) from error
        try:
            yield
        finally:
            if [path.name for path in workdir.iterdir()] == [lock.name]:
                lock.unlink()
                for folder in made:
                    folder.rmdir()


@contextlib.contextmanager
def _disk_failure_named(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"can't write {workdir} ({error.strerror or error}): make room, then go on with "
            "--resume; what was complete is still there"
        ) from error


def _start(
    run: Run, workdir: Path, saved: TrainingCheckpoints, progress: Progress, *, resume: bool
) -> tuple[TrainState, Progressed]:
    """Returns where the run begins, or where it goes on."""
    state = create_state(run.config, run.variables, run.mesh)
    restored = saved.restore_latest(variables_of(state), training_of(state)) if resume else None
    if restored is None:
        return state, Progressed()
    variables, training, description, damages = restored
    for damage in damages:
        progress.say(f"{damage}; it is now in {workdir / checkpoints.DAMAGED}")
    _check_same_split(run, workdir)
    done = Progressed.from_json(dict(description.progress))
    steps = f" and {len(done.begun)} steps of the next" if done.begun else ""
    progress.say(f"resuming behind epoch {done.epochs}{steps}")
    return state._replace(**variables._asdict(), **training), done


def check_workdir(config: TrainConfig, workdir: Path, *, resume: bool) -> None:
    """Refuses to overwrite a run, to resume nothing, and to resume another config's run.

    Raises:
        InputError: One of these.
    """
    path = workdir / "config.json"
    if not resume:
        if path.exists() or checkpoints.exists(workdir):
            raise InputError(
                f"{workdir} already holds a run: continue it with --resume, or choose another "
                "--workdir"
            )
        return
    before, now = (flatten_dict(to_dict(c), sep=".") for c in (read_config(workdir), config))
    changed = [name for name in now if now[name] != before[name] and name not in RESUMABLE]
    if changed:
        name = changed[0]
        raise InputError(
            f"{workdir} was trained with {name} = {before[name]!r}, not {now[name]!r}: resume it "
            "with its own config, or choose another --workdir"
        )


def read_config(workdir: Path) -> TrainConfig:
    """Returns the config of the run in `workdir`.

    Raises:
        InputError: There is none.
    """
    try:
        values = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        return from_dict(TrainConfig, values)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{workdir} holds no run to resume ({error})") from None


def _check_same_split(run: Run, workdir: Path) -> None:
    manifest = workdir / "split.json"
    if splits.read_manifest(manifest, run.dataset.names) != run.split:
        raise InputError(
            f"{manifest} differs from the split of this data set: resume with the data that the "
            "run began with, or choose another --workdir"
        )


def _write_start(run: Run, workdir: Path) -> None:
    if not is_first():
        return
    write_atomically(workdir / "config.json", json_bytes(to_dict(run.config)))
    splits.write_manifest(
        workdir / "split.json", run.split, run.dataset.names, method=split_method(run.config)
    )
    facts = {
        "pos_weight": run.pos_weight,
        "steps_per_epoch": run.steps_per_epoch,
        "devices": [str(device) for device in run.mesh.devices.flat],
        "device_kind": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    write_atomically(workdir / "run.json", json_bytes(facts))


def _write_curves(done: Progressed, workdir: Path) -> None:
    from fetal_flax.evaluation import pictures  # Matplotlib: no start should wait for it.

    pictures.training_curves(workdir / "curves.png", done.history)


def _write_sheet(run: Run, workdir: Path) -> None:
    """Draws validation images, from the worst ellipse to the best, with the best checkpoint."""
    from fetal_flax.evaluation import pictures
    from fetal_flax.evaluation.ellipse_metrics import ellipse_mask
    from fetal_flax.evaluation.head import OUTLINE_PX, measure_head
    from fetal_flax.evaluation.metrics import segmentation_metrics
    from fetal_flax.inference.predictor import Predictor

    predictor = Predictor.from_checkpoint(workdir)
    records = [run.dataset.record(i) for i in run.split.validation]
    masks = predictor.masks([record.image for record in records])
    outline_px = OUTLINE_PX[run.config.data.dataset]
    images = []
    for record, mask in zip(records, masks, strict=True):
        truth = record.mask > 0
        head = measure_head(mask, record.pixel_size_mm, outline_px=outline_px)
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
