"""Self-describing checkpoints: arrays by name, and a description of what they are.

The only file that knows Orbax. A training workdir and a converted directory look alike:

    DIR/checkpoints/NUMBER/variables     parameters and batch statistics, by name
    DIR/checkpoints/NUMBER/training      step, optimizer state, learning rates; training only
    DIR/checkpoints/NUMBER/description   JSON: kind, network, image size, config, progress, SHA-256
    DIR/damaged/NUMBER                   what a resumed run could not read

A run's NUMBER is its complete epochs times a million, plus the steps done of the next: 3000000 is
the end of the third epoch, 3000017 an interruption 17 steps later. Saving is atomic: Orbax renames
a complete checkpoint into place, and ignores what is not. What comes back is what was saved:
SHA-256 digests of arrays and description are in the description.

`load_checkpoint` is the way to every network, whatever holds it: one of these folders, or one of
the plain files that networks are shipped in (shipped.py), which may be given by its name.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from fetal_flax.checkpoints import shipped
from fetal_flax.checkpoints.description import (
    Checkpoint,
    DamagedError,
    Description,
    Kind,
    from_json,
    to_json,
)
from fetal_flax.checkpoints.integrity import checked, digest_of_arrays, digest_of_json
from fetal_flax.errors import InputError, printable
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables

FOLDER = "checkpoints"
DAMAGED = "damaged"
PER_EPOCH = 1_000_000
_OF_PYTORCH = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".tar")
_policies = checkpoint_managers.preservation_policy
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES)


class TrainingCheckpoints:
    """The checkpoints of a run: the last two and the best by validation Dice.

    With several processes, all of them make the same calls; the folder is one that they share.

    Args:
        workdir: The run's folder.

    Raises:
        DamagedError: There are checkpoints, and none of them has a description that can be read.
    """

    def __init__(self, workdir: Path):
        best = _policies.BestN(get_metric_fn=_dice, n=1, keep_checkpoints_without_metrics=False)
        keep = _policies.AnyPreservationPolicy([_policies.LatestN(2), best])
        _silence_late_reports()
        self._workdir = workdir
        self._damaged = _damaged_descriptions(workdir)
        if self._damaged and len(self._damaged) == len(_numbers(workdir)):
            raise next(iter(self._damaged.values()))
        # Orbax opens no folder in which one is broken.
        self._put_aside(self._damaged)
        with _damage_named(workdir):
            self._manager = ocp.CheckpointManager(
                (workdir / FOLDER).resolve(),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=keep,
                    best_fn=_dice,
                    best_mode="max",
                    # What a killed run was saving.
                    cleanup_tmp_directories=True,
                ),
            )

    def save(
        self,
        epochs: int,
        variables: Variables,
        training: Any,
        description: Description,
        validation_dice: float | None,
        *,
        begun: int = 0,
    ) -> None:
        """Saves in the background; the arrays may be donated as soon as this returns.

        Args:
            epochs: Complete epochs.
            variables: Parameters and batch statistics.
            training: The rest of the training state.
            description: What it is.
            validation_dice: After a complete epoch; None in between.
            begun: Steps done of the next epoch.

        Raises:
            OSError: It can't be written, or the one before couldn't.
        """
        items = {"variables": variables._asdict(), "training": training}
        with _write_failure_named():
            metrics = None if validation_dice is None else {"dice": validation_dice}
            self._manager.save(
                epochs * PER_EPOCH + begun,
                args=_save_arguments(items, description, metrics),
                metrics=metrics,
            )

    def restore_latest(
        self, variables: Variables, training: Any
    ) -> tuple[Variables, Any, Description, list[str]] | None:
        """Restores the last checkpoint that is whole, or returns None where there is none at all.

        What is damaged is moved to WORKDIR/damaged, so that the run can save in its place.

        Args:
            variables: Arrays or shapes with the shardings to restore to.
            training: The same for what `save` got as `training`.

        Returns:
            Variables, training, description, and what was wrong with each damaged checkpoint.

        Raises:
            DamagedError: None is whole.
            InputError: The last is of another format.
        """
        abstract = {"variables": variables._asdict(), "training": training}
        damaged: dict[int, DamagedError] = {}
        for number in sorted(self._manager.all_steps(), reverse=True):
            try:
                items, description = _restore(self._manager, number, abstract, self._workdir)
            except DamagedError as error:
                damaged[number] = error
                continue
            self._put_aside(damaged)
            self._manager.reload()
            messages = [str(error) for error in (self._damaged | damaged).values()]
            return Variables(**items["variables"]), items["training"], description, messages
        if damaged:
            raise next(iter(damaged.values()))
        return None

    def wait(self) -> None:
        """Waits until everything is saved.

        Raises:
            OSError: It can't be written.
        """
        with _write_failure_named():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Closes the checkpoint manager; `wait` first.

        Raises:
            OSError: What was still being saved can't be written.
        """
        with _write_failure_named():
            self._manager.close()

    def _put_aside(self, numbers: Collection[int]) -> None:
        if numbers and jax.process_index() == 0:
            folder = self._workdir / DAMAGED
            folder.mkdir(exist_ok=True)
            for number in numbers:
                target = folder / str(number)
                shutil.rmtree(target, ignore_errors=True)
                (self._workdir / FOLDER / str(number)).rename(target)
        multihost_utils.sync_global_devices("damaged checkpoints put aside")


def save_checkpoint(directory: Path | str, checkpoint: Checkpoint) -> None:
    """Saves what no training goes on from, such as a converted network; all or nothing.

    Args:
        directory: Folder to make, or one without a checkpoint; every command and `load_checkpoint`
            take it then.
        checkpoint: What to save.

    Raises:
        InputError: The directory already holds a checkpoint, or can't be written.

    Example:
        >>> checkpoint = ff.load_checkpoint("runs/hc18")
        >>> ff.save_checkpoint("copy", checkpoint)
        >>> ff.load_checkpoint("copy").config == checkpoint.config
        True
    """
    directory = Path(directory)
    variables, description = checkpoint
    folder = directory / FOLDER
    if folder.exists():
        raise InputError(f"{directory} already holds a checkpoint: choose another --output")
    made_directory = not directory.exists()
    try:
        with ocp.CheckpointManager(folder.resolve()) as manager:
            manager.save(0, args=_save_arguments({"variables": variables._asdict()}, description))
    except BaseException as error:
        # A retry must not find half a checkpoint.
        shutil.rmtree(directory if made_directory else folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(
                f"can't write {directory} ({error.strerror or error}): choose an --output that "
                "can be written"
            ) from error
        raise


def load_checkpoint(
    source: Path | str, *, kinds: Sequence[Kind] = ("network",), last: bool = False
) -> Checkpoint:
    """Loads a run's best checkpoint, a converted one, or a shipped network.

    Args:
        source: A folder that holds one of them, or a shipped network's name.
        kinds: What it may be.
        last: Of a run, the last checkpoint instead of the best.

    Returns:
        The variables as float32 arrays on the first device, and what the checkpoint says of them.

    Raises:
        InputError: There is no checkpoint, it can't be read, it holds an encoder where a network
            is wanted, or the name of a shipped network is a folder's with a checkpoint, too.

    Example:
        >>> checkpoint = ff.load_checkpoint("runs/hc18")
        >>> checkpoint.config.title, checkpoint.image_size
        ('unet', (64, 96))
        >>> sum(array.size for array in checkpoint.variables.params.values())
        30715
    """
    directory = locate(source)
    if shipped.exists(directory) and not exists(directory):
        return shipped.load(directory)
    with _reader(directory) as manager:
        number, description = _describe(manager, directory, last=last)
        if description.kind not in kinds:
            raise InputError(
                f"{directory} holds an encoder alone: train a network on it with "
                f"--encoder.weights {directory}"
            )
        variables = _load(manager, number, _shapes(description), directory)
        return Checkpoint(variables, description)


def load_encoder(source: Path | str, expected: Variables) -> Variables:
    """Loads the encoder of a converted encoder or of a whole network.

    Args:
        source: As of `load_checkpoint`.
        expected: Shapes to load.

    Raises:
        InputError: There is no checkpoint, it can't be read, or the shapes differ.
    """
    variables, _ = load_checkpoint(source, kinds=("network", "encoder"))
    loaded = functional.encoder_part(variables)
    for ours, theirs in zip(expected, loaded, strict=True):
        differing = [n for n in ours if n not in theirs or ours[n].shape != theirs[n].shape]
        if differing:
            channels = expected.params[functional.STEM].shape[2]
            raise InputError(
                f"{source} has another encoder ({differing[0]} differs): convert the "
                f"torchvision file again with --channels {channels}"
            )
    return loaded


def locate(source: Path | str) -> Path:
    """Returns the folder of a checkpoint that is given by its path or by a shipped network's name.

    Raises:
        InputError: Both are there, so that which one is used would depend on where one stands.
    """
    path = Path(source)
    if str(path) not in shipped.names():
        return path
    if exists(path) or shipped.exists(path):
        raise InputError(
            f"{path} is the name of a shipped network, and a folder here that holds a checkpoint: "
            f"give the folder as {path.absolute()}, or rename it"
        )
    return shipped.FOLDER / path


def exists(directory: Path) -> bool:
    """Returns whether a run or a conversion has left checkpoints here."""
    return (directory / FOLDER).is_dir()


def _no_checkpoint(path: Path) -> str:
    """Returns a sentence for what is no checkpoint, with the way out where it is near one."""
    for folder in path.parents:
        if exists(folder) and path.is_relative_to(folder / FOLDER):
            return f"{path} is a part of the checkpoints of a run: give the run's folder, {folder}"
    if path.is_file() and path.suffix.lower() in _OF_PYTORCH:
        return (
            f"{path} is a file of weights, not a folder: make one of it with fetal-flax convert "
            f"--source {path} --output {path.with_suffix('')}, and give that"
        )
    if path.is_file():
        return f"{path} is a file, not a checkpoint's folder: give {shipped.choices()}"
    return f"{path} holds no checkpoint: give {shipped.choices()}"


@contextlib.contextmanager
def _reader(directory: Path) -> Iterator[ocp.CheckpointManager]:
    if not exists(directory):
        raise InputError(_no_checkpoint(directory))
    process = jax.process_index()
    options = ocp.CheckpointManagerOptions(
        read_only=True,
        save_interval_steps=0,
        create=False,
        best_fn=_dice,
        best_mode="max",
        # One process may read alone, without waiting for the others.
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=process,
            active_processes={process},
            barrier_sync_key_prefix=f"reader{process}",
        ),
    )
    if damaged := _damaged_descriptions(directory):
        raise next(iter(damaged.values()))
    with (
        _damage_named(directory),
        ocp.CheckpointManager((directory / FOLDER).resolve(), options=options) as manager,
    ):
        yield manager


@contextlib.contextmanager
def _damage_named(directory: Path, number: int | None = None) -> Iterator[None]:
    """Turns what Orbax says of broken files into a sentence that names their place."""
    folder = directory / FOLDER / ("" if number is None else str(number))
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # Of broken files, Orbax and TensorStore raise many kinds.
        reason = str(error).partition("See full TensorStore")[0].strip() or type(error).__name__
        reason = printable(reason.splitlines()[0])
        raise DamagedError(
            f"{folder} is damaged ({reason}): restore it from a copy, or move it away to fall back "
            "on another"
        ) from error


@contextlib.contextmanager
def _write_failure_named() -> Iterator[None]:
    """Turns TensorStore's words for a full disk into the OSError that it is."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        for code in _DISK_ERRORS:
            if os.strerror(code) in str(error):
                raise OSError(code, os.strerror(code)) from error
        raise


def _save_arguments(
    items: Mapping[str, Any],
    description: Description,
    metrics: Mapping[str, float] | None = None,
) -> ocp.args.Composite:
    values = to_json(description)
    digests = {name: digest_of_arrays(tree) for name, tree in items.items()}
    digests["description"] = digest_of_json(values)
    if metrics is not None:
        digests["metrics"] = digest_of_json(metrics)
    return ocp.args.Composite(
        **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
        description=ocp.args.JsonSave(values | {"sha256": digests}),
    )


def _restore(
    manager: ocp.CheckpointManager, number: int, abstract: Mapping[str, Any], directory: Path
) -> tuple[dict[str, Any], Description]:
    """Restores the items of `abstract` and the description, and checks their digests."""
    _silence_late_reports()
    with _damage_named(directory, number):
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        restored = manager.restore(
            number, args=ocp.args.Composite(**arguments, description=ocp.args.JsonRestore())
        )
        values, digests = checked(restored["description"])
        description = from_json(values, str(directory))
        items = {name: restored[name] for name in abstract}
        for name, tree in items.items():
            if digests[name] != digest_of_arrays(tree):
                raise ValueError(f"its {name} are not what was saved")
    return items, description


_LATE = (
    "Event loop is closed",
    "See full TensorStore details",
    "Error writing ",
    "cannot schedule new futures after shutdown",
    "Python is likely shutting down",
)


@functools.cache
def _silence_late_reports() -> None:
    """Keeps a traceback for each array off the terminal when one can't be read or written.

    Orbax gives up at the first and closes its event loop; TensorStore still reports the others to
    it or to the coroutines that waited, each an exception that nothing can catch.
    """
    unraisablehook, excepthook = sys.unraisablehook, sys.excepthook

    def is_late(error: BaseException | None) -> bool:
        of_disk = isinstance(error, OSError) and error.errno in _DISK_ERRORS
        return of_disk or any(words in str(error) for words in _LATE)

    def of_nobody(unraisable: Any) -> None:
        if not is_late(unraisable.exc_value):
            unraisablehook(unraisable)

    def of_a_thread(kind: Any, error: BaseException, traceback: Any) -> None:
        if threading.current_thread() is threading.main_thread() or not is_late(error):
            excepthook(kind, error, traceback)

    def of_a_task(record: logging.LogRecord) -> bool:
        return not (record.exc_info and is_late(record.exc_info[1]))

    sys.unraisablehook, sys.excepthook = of_nobody, of_a_thread
    logging.getLogger("asyncio").addFilter(of_a_task)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _damaged_descriptions(directory: Path) -> dict[int, DamagedError]:
    """Returns the checkpoints whose description or validation Dice is not what was saved.

    Read without Orbax, which chooses the best checkpoint by an unchecked Dice.
    """
    damaged = {}
    for number in _numbers(directory):
        folder = directory / FOLDER / str(number)
        try:
            with _damage_named(directory, number):
                _, digests = checked(json.loads((folder / "description/metadata").read_bytes()))
                if "metrics" in digests:
                    metrics = json.loads((folder / "metrics/metrics").read_bytes())
                    if digests["metrics"] != digest_of_json(metrics):
                        raise ValueError("its validation Dice is not what was saved")
        except DamagedError as error:
            damaged[number] = error
    return damaged


def _numbers(directory: Path) -> list[int]:
    folder = directory / FOLDER
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(path.name) for path in paths if path.name.isdigit()), reverse=True)


def _describe(
    manager: ocp.CheckpointManager, directory: Path, *, last: bool
) -> tuple[int, Description]:
    number = None if last else manager.best_step()
    if number is None:
        number = manager.latest_step()
    if number is None:
        raise InputError(f"{directory} holds no complete checkpoint: train or convert again")
    return number, _restore(manager, number, {}, directory)[1]


def _shapes(description: Description) -> Variables:
    shapes = functional.shapes(description.model)
    return functional.encoder_part(shapes) if description.kind == "encoder" else shapes


def _load(
    manager: ocp.CheckpointManager, number: int, shapes: Variables, directory: Path
) -> Variables:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes._asdict()
    )
    items, _ = _restore(manager, number, {"variables": abstract}, directory)
    return Variables(**items["variables"])


def _dice(metrics: Mapping[str, float]) -> float:
    return metrics["dice"]
