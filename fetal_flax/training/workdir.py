"""The workdir of a training run: who may use it, and what is in it.

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
"""

import contextlib
import json
import platform
from collections.abc import Iterator
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict

from fetal_flax import checkpoints
from fetal_flax._util.files import json_bytes, write_atomically
from fetal_flax._util.locks import locked
from fetal_flax.config import TrainConfig, from_dict, to_dict
from fetal_flax.data import splits
from fetal_flax.errors import InputError, RunError
from fetal_flax.training.distributed import is_first
from fetal_flax.training.setup import Setup, split_method

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


@contextlib.contextmanager
def hold_workdir(workdir: Path) -> Iterator[None]:
    """Keeps other trainings out of `workdir`, and leaves no folder that nothing was written to."""
    if not is_first():
        yield
        return
    lock = workdir / ".lock"
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    held = contextlib.ExitStack()
    try:
        held.enter_context(locked(lock, wait=False))
    except OSError as error:
        raise InputError(
            f"can't write {workdir} ({error.strerror}): choose another --workdir"
        ) from error
    try:
        with held:
            yield
    finally:
        if [path.name for path in workdir.iterdir()] == [lock.name]:
            # After the lock, since Windows removes no open file. Another training may hold it now.
            with contextlib.suppress(OSError):
                lock.unlink()
                for folder in made:
                    folder.rmdir()


@contextlib.contextmanager
def disk_failure_named(workdir: Path) -> Iterator[None]:
    """Turns what the system says of a disk into a sentence with the way out.

    Raises:
        RunError: Something in `workdir` can't be written.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"can't write {workdir} ({error.strerror or error}): make room, then go on with "
            "--resume; what was complete is still there"
        ) from error


def check_workdir(config: TrainConfig, workdir: Path, *, resume: bool) -> None:
    """Refuses to overwrite a run, to resume nothing, and to resume another config's setup.

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
    # A cosine ends with the last epoch, so the steps before depend on how many there are.
    fixed = {"schedule.epochs"} if config.schedule.decay == "cosine" else set()
    resumable = set(RESUMABLE) - fixed
    changed = [name for name in now if now[name] != before[name] and name not in resumable]
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
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{workdir} holds no run to resume: give the run's --workdir, or leave --resume out"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{workdir} can't be resumed, since its config.json can't be read ({error}): restore "
            "that file, or train anew in another --workdir"
        ) from None


def check_same_split(setup: Setup, workdir: Path) -> None:
    """Refuses to go on with other images than the run began with.

    Raises:
        InputError: The split in `workdir` can't be read or differs from the run's.
    """
    manifest = workdir / "split.json"
    if splits.read_manifest(manifest, setup.dataset.names) != setup.split:
        raise InputError(
            f"{manifest} differs from the split of this data set: resume with the data that the "
            "run began with, or choose another --workdir"
        )


def write_start(setup: Setup, workdir: Path) -> None:
    """Writes config.json, split.json and run.json.

    Raises:
        InputError: One of them can't be written.
    """
    if not is_first():
        return
    write_atomically(workdir / "config.json", json_bytes(to_dict(setup.config)))
    splits.write_manifest(
        workdir / "split.json", setup.split, setup.dataset.names, method=split_method(setup.config)
    )
    facts = {
        "pos_weight": setup.pos_weight,
        "steps_per_epoch": setup.steps_per_epoch,
        "devices": [str(device) for device in setup.mesh.devices.flat],
        "device_kind": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    write_atomically(workdir / "run.json", json_bytes(facts))
