"""A training run from its config to its workdir.

WORKDIR/config.json          the whole config
WORKDIR/split.json           which image is on which side
WORKDIR/run.json             what was found out at the start: pos_weight, versions, devices
WORKDIR/checkpoints/         the last two epochs and the best; where the run was interrupted
WORKDIR/metrics.csv          a row per epoch; tensorboard/ has the same and every step
WORKDIR/curves.png           loss, Dice and learning rate over the epochs
WORKDIR/validation.png       validation images with the outlines of truth and prediction
WORKDIR/profile/             traces of a few steps, with --profile
WORKDIR/non_finite/          the batch that stopped the run, where one did
WORKDIR/damaged/             checkpoints that could not be read, where a run resumed before them
WORKDIR/.lock                held while a training runs

A run that was stopped at any moment, even by SIGKILL, goes on with `resume` and ends as it would
have ended, to the bit: what a step computes depends on the state and on (seed, step) alone.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from fetal_flax import checkpoints
from fetal_flax.checkpoints import Description, TrainingCheckpoints
from fetal_flax.config import TrainConfig, from_dict, to_dict
from fetal_flax.conversion.encoder_weights import load_encoder
from fetal_flax.data import splits
from fetal_flax.data.builders import Dataset, open_dataset
from fetal_flax.data.foreground import foreground_pixels
from fetal_flax.data.pipeline import (
    DeviceBatches,
    TrainingOrder,
    WorkerDiedError,
    evaluation_batches,
    prefetch_to_device,
    steps_per_epoch,
    training_batches,
)
from fetal_flax.data.resident import (
    Resident,
    evaluation_plan,
    load_resident,
    resident_foreground_pixels,
    training_plans,
)
from fetal_flax.errors import InputError, Interrupted, RunError
from fetal_flax.files import json_bytes, locked, write_atomically
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables
from fetal_flax.training.distributed import everywhere, is_first, shard
from fetal_flax.training.interruption import Interruption
from fetal_flax.training.progress import Bar, Logs, Progress, traced
from fetal_flax.training.schedule import EarlyStopping, Plateau
from fetal_flax.training.sharding import (
    batch_sharding,
    check_batch_size,
    create_mesh,
    plan_sharding,
    replicate,
    replicated,
)
from fetal_flax.training.startup import AheadOfTime, compile_train_step
from fetal_flax.training.step import Steps, TrainState, create_state, create_steps

SHEET_IMAGES = 12
# Settings that may change when a run is resumed: they don't change what a step computes.
RESUMABLE = (
    "schedule.epochs",
    "schedule.non_finite",
    "data.workers",
    "data.prefetch",
    "data.steps_per_dispatch",
    "data.cache_dir",
    "data.data_dir",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that is settled before the first step."""

    config: TrainConfig
    dataset: Dataset
    split: splits.Split
    pos_weight: float
    mesh: jax.sharding.Mesh
    steps: Steps
    train_step: AheadOfTime
    """`steps.train`, or `steps.train_resident` where a call does several steps."""
    steps_per_epoch: int
    variables: Variables
    resident: Resident | None
    """The images, where they are on the devices."""

    @functools.cached_property
    def pos_weight_on_devices(self) -> jax.Array:
        """`pos_weight` as the steps take it."""
        return replicate(np.float32(self.pos_weight), self.mesh)

    def description(self, progress: dict[str, Any]) -> Description:
        """Returns what the run's checkpoints say of themselves."""
        return Description(
            kind="network",
            model=self.config.model,
            image_size=self.config.data.image_size,
            config=to_dict(self.config) | {"pos_weight": self.pos_weight},
            progress=progress,
        )


@dataclasses.dataclass(frozen=True)
class Progressed:
    """Where a run stands, besides its arrays."""

    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    plateau: Plateau = dataclasses.field(default_factory=Plateau)
    stopping: EarlyStopping = dataclasses.field(default_factory=EarlyStopping)
    begun: list[tuple[float, float] | None] = dataclasses.field(default_factory=list)
    """Loss and Dice of the steps done of the next epoch; None of a step that was skipped."""

    @property
    def epochs(self) -> int:
        """Epochs done."""
        return len(self.history)

    def to_json(self) -> dict[str, Any]:
        """Returns the state for a checkpoint's description."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progressed":
        """Returns the state from a checkpoint's description."""
        return cls(
            list(values["history"]),
            Plateau(**values["plateau"]),
            EarlyStopping(**values["stopping"]),
            [step and (step[0], step[1]) for step in values["begun"]],
        )


def prepare(config: TrainConfig) -> Run:
    """Loads weights and data, splits, and builds the steps; nothing is written but caches.

    Raises:
        InputError: A setting, a weight file or the data set can't be used.
    """
    mesh = create_mesh()
    check_batch_size(config.schedule.batch_size, mesh)
    cache_dir = Path(config.data.cache_dir).expanduser()
    encoder = load_encoder(config.encoder.weights, config.model, cache_dir)
    dataset = open_dataset(config.data, config.seed)
    split = splits.split(dataset.names, dataset.examinations, **_split_method(config))
    epoch_steps = steps_per_epoch(len(split.train), config.schedule.batch_size)
    steps = create_steps(config, mesh)
    # All that follows happens while a thread compiles.
    train_step = compile_train_step(
        config,
        steps,
        records=len(dataset),
        steps_per_dispatch=_steps_per_dispatch(config, mesh, epoch_steps),
    )
    resident = None
    if config.data.backend == "device":
        resident = load_resident(dataset, config.data.image_size, replicated(mesh))
    pos_weight = config.loss.pos_weight
    if pos_weight == "auto":
        pixels = (
            foreground_pixels(dataset, config.data.image_size)
            if resident is None
            else resident_foreground_pixels(resident)
        )
        foreground = pixels[list(split.train)].mean() / math.prod(config.data.image_size)
        pos_weight = (1 - foreground) / foreground
    variables = functional.init(config.model, config.seed)
    if encoder is not None:
        variables = Variables(
            variables.params | encoder.params, variables.batch_stats | encoder.batch_stats
        )
    return Run(
        config=config,
        dataset=dataset,
        split=split,
        pos_weight=float(pos_weight),
        mesh=mesh,
        steps=steps,
        train_step=train_step,
        steps_per_epoch=epoch_steps,
        variables=variables,
        resident=resident,
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
            saved = stack.enter_context(contextlib.closing(TrainingCheckpoints(workdir)))
            state, done = _start(run, workdir, saved, progress, resume=resume)
            logs = None
            if is_first():
                _write_start(run, workdir)
                logs = Logs(workdir, int(state.step), done.history)
                stack.enter_context(contextlib.closing(logs))
            underway = Underway(run, workdir, state, done, saved, logs, progress, interruption)
            _train_epochs(underway, workdir / "profile" if profile else None)
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
    restored = saved.restore_latest(_variables(state), _training(state)) if resume else None
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


def describe(run: Run) -> str:
    """Returns the run in three lines: network, data, devices."""
    config, split = run.config, run.split
    encoder = "trainable" if config.encoder.trainable else "frozen"
    weights = {"none": "random weights"}.get(config.encoder.weights, config.encoder.weights)
    of_encoder = "" if config.model.name == "unet" else f", {encoder} encoder from {weights}"
    examinations = [
        len({run.dataset.examinations[i] for i in side}) for side in (split.train, split.validation)
    ]
    device = jax.devices()[0]
    proposed = config.model.name == "mobilenet_aspp_se_unet"
    variant = f" ({config.model.variant})" if proposed else ""
    return (
        f"{config.model.name}{variant}{of_encoder}\n"
        f"{len(split.train)} training images of {examinations[0]} examinations, "
        f"{len(split.validation)} validation images of {examinations[1]}, "
        f"pos_weight {run.pos_weight:.3f}\n"
        f"{run.mesh.size} x {device.device_kind} ({device.platform}), "
        f"batch {config.schedule.batch_size}, {run.steps_per_epoch} steps per epoch"
    )


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


class Training(NamedTuple):
    """What an epoch is made of: `state, metrics = step(state, *constants, next(work))`."""

    step: Callable[..., Any]
    constants: tuple[Any, ...]
    work: DeviceBatches
    """A batch, or a plan of several, at a time."""
    steps: int
    """Training steps that one call of `step` does; in an epoch that has begun, fewer at first."""


@contextlib.contextmanager
def open_training(run: Run, start_step: int, total_steps: int) -> Iterator[Training]:
    """Opens the steps from `start_step` up to `total_steps`, an epoch's end."""
    config = run.config
    if run.resident is None:
        batches = training_batches(
            run.dataset,
            run.split.train,
            config.data,
            config.augmentation,
            channels=config.model.in_channels,
            seed=config.seed,
            batch_size=config.schedule.batch_size,
            start_step=start_step,
            total_steps=total_steps,
            shard=shard(),
        )
        work = prefetch_to_device(batches, batch_sharding(run.mesh))
        training = Training(run.train_step, (run.pos_weight_on_devices,), work, steps=1)
    else:
        steps = _steps_per_dispatch(config, run.mesh, run.steps_per_epoch)
        order = TrainingOrder(
            run.split.train, config.augmentation, config.seed, config.schedule.batch_size
        )
        plans = training_plans(
            order,
            config.data.image_size,
            steps=steps,
            start_step=start_step,
            total_steps=total_steps,
            shard=shard(),
        )
        sharding = plan_sharding(run.mesh)
        if steps == 1:
            # Taken in a call of its own: in the step's, XLA's CPU backend repeats the warp for
            # each of its readers and takes twenty times as long.
            take = functools.partial(run.steps.take, run.resident)
            work = prefetch_to_device(plans, sharding, prepare=take)
            training = Training(run.train_step, (run.pos_weight_on_devices,), work, steps)
        else:
            work = prefetch_to_device(plans, sharding)
            constants = run.pos_weight_on_devices, run.resident

            def step(*arguments: Any) -> tuple[TrainState, dict[str, jax.Array]]:
                whole = len(arguments[-1].record) == steps
                return (run.train_step if whole else run.steps.train_resident)(*arguments)

            training = Training(step, constants, work, steps)
    with contextlib.closing(work):
        yield training


def _steps_per_dispatch(config: TrainConfig, mesh: jax.sharding.Mesh, epoch_steps: int) -> int:
    """Returns the largest divisor of an epoch's steps that the settings allow."""
    if config.data.backend == "host":
        return 1
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    default = 1 if on_cpu else epoch_steps
    at_most = min(config.data.steps_per_dispatch or default, epoch_steps)
    return next(n for n in range(at_most, 0, -1) if epoch_steps % n == 0)


def evaluate(
    run: Run, variables: Variables, interruption: Interruption | None = None
) -> dict[str, float]:
    """Returns mean loss and Dice over the validation split, every image counted once.

    Raises:
        Interrupted: `interruption` was requested.
    """
    losses, dices = [], []
    for metrics in _evaluated_batches(run, variables):
        valid = np.asarray(metrics["valid"])
        losses += [float(metrics["loss"])] * int(valid.sum())
        dices += np.asarray(metrics["dice"])[valid].tolist()
        if interruption and interruption.requested():
            raise Interrupted
    return {"validation_loss": float(np.mean(losses)), "validation_dice": float(np.mean(dices))}


def _evaluated_batches(run: Run, variables: Variables) -> Iterator[dict[str, Any]]:
    """Yields the metrics of each batch."""
    config, batch_size = run.config, run.config.schedule.batch_size
    if run.resident is not None:
        plan = evaluation_plan(run.split.validation, batch_size, shard())
        plans = prefetch_to_device(iter([plan]), plan_sharding(run.mesh))
        metrics = jax.device_get(
            run.steps.evaluate_resident(
                variables, run.pos_weight_on_devices, run.resident, next(plans)
            )
        )
        for step in range(len(plan.record)):
            yield {name: values[step] for name, values in metrics.items()}
        return
    batches = evaluation_batches(
        run.dataset,
        run.split.validation,
        config.data,
        channels=config.model.in_channels,
        batch_size=batch_size,
        shard=shard(),
    )
    with contextlib.closing(prefetch_to_device(batches, batch_sharding(run.mesh))) as on_device:
        for batch in on_device:
            yield run.steps.evaluate(variables, run.pos_weight_on_devices, batch)


class _NonFinite(Exception):  # noqa: N818  It leaves this module as a RunError.
    """A step was not applied, and the run is to stop."""


@dataclasses.dataclass
class Underway:
    """A run on its way: what changes from step to step, and where it is written."""

    run: Run
    workdir: Path
    state: TrainState
    done: Progressed
    saved: TrainingCheckpoints
    logs: Logs | None
    """None in all processes but the first."""
    progress: Progress
    interruption: Interruption

    def save(self, validation_dice: float | None = None) -> None:
        """Saves the state in the background, after an epoch or in between."""
        self.saved.save(
            self.done.epochs,
            _variables(self.state),
            _training(self.state),
            self.run.description(self.done.to_json()),
            validation_dice,
            begun=len(self.done.begun),
        )

    def count(self, metrics: dict[str, Any]) -> None:
        """Notes what a call of the step has measured.

        Raises:
            _NonFinite: One of its steps was not applied, and the run is to stop.
        """
        for loss, dice, applied in zip(
            *(np.atleast_1d(metrics[name]) for name in ("loss", "dice", "applied")), strict=True
        ):
            if not applied and self.run.config.schedule.non_finite == "stop":
                raise _NonFinite
            self.done.begun.append((float(loss), float(dice)) if applied else None)
            step = self.done.epochs * self.run.steps_per_epoch + len(self.done.begun)
            if not applied:
                self.progress.say(f"step {step} skipped: its loss or gradients are not finite")
            elif self.logs:
                self.logs.step(step, float(loss), float(dice))


def _train_epochs(underway: Underway, traces: Path | None) -> None:
    """Trains up to the last epoch.

    Raises:
        Interrupted: The run was asked to stop, and is saved.
        RunError: It can't go on.
    """
    run, interruption = underway.run, underway.interruption
    total_steps = run.config.schedule.epochs * run.steps_per_epoch
    interruption.defer()
    died_at = None
    try:
        while True:
            try:
                start_step = int(underway.state.step)
                with (
                    open_training(run, start_step, total_steps) as opened,
                    traced(opened.step, traces) as step,
                ):
                    _train_remaining(underway, opened._replace(step=step))
                return
            except WorkerDiedError as error:
                if interruption.noticed:
                    raise Interrupted from None
                died_before, died_at = died_at, int(underway.state.step)
                if died_at == died_before:
                    raise RunError(
                        f"data workers keep ending before step {died_at + 1} ({error}): see to "
                        "their memory, or go on with --resume --data.workers 0"
                    ) from None
                underway.progress.say("a data worker ended; starting new ones")
                traces = None
    except Interrupted:
        underway.save()
        underway.saved.wait()
        raise Interrupted(
            f"stopped after step {int(underway.state.step)}, and saved: go on with --resume "
            f"--workdir {underway.workdir}"
        ) from None
    except _NonFinite:
        raise RunError(_stop_at_non_finite(underway)) from None


def _train_remaining(underway: Underway, training: Training) -> None:
    run, schedule = underway.run, underway.run.config.schedule
    done = underway.done
    while done.epochs < schedule.epochs and not done.stopping.should_stop(schedule):
        start = time.perf_counter()
        numbers = _train_epoch(underway, training)
        numbers |= evaluate(run, _variables(underway.state), underway.interruption)
        numbers |= {
            "learning_rate": float(underway.state.learning_rates["main"]),
            "seconds": time.perf_counter() - start,
        }
        underway.state, done = _decide(run, underway.state, done, numbers)
        underway.done = done
        underway.save(numbers["validation_dice"])
        if underway.logs:
            underway.logs.epoch(done.history)
        underway.progress.epoch(numbers, is_best=done.stopping.best_epoch == done.epochs)


def _train_epoch(underway: Underway, training: Training) -> dict[str, float]:
    """Runs an epoch's steps, reading metrics one call late so that dispatch never waits."""
    run, done, work = underway.run, underway.done, training.work
    batch_size = run.config.schedule.batch_size
    epoch = done.epochs + 1
    begun_before = len(done.begun)
    pending: collections.deque[dict[str, jax.Array]] = collections.deque()
    waited, start = work.waited_seconds, time.perf_counter()

    def rates() -> dict[str, float]:
        elapsed = time.perf_counter() - start
        return {
            "images_per_second": (len(done.begun) - begun_before) * batch_size / elapsed,
            "waiting": (work.waited_seconds - waited) / elapsed,
        }

    def read(bar: Bar) -> None:
        steps_before = len(done.begun)
        underway.count(jax.device_get(pending.popleft()))
        bar.advance(len(done.begun) - steps_before)
        if last := done.begun[-1]:
            bar.show(loss=last[0], dice=last[1], **rates())

    with underway.progress.bar(epoch, run.steps_per_epoch, begun_before) as bar:
        dispatched = begun_before
        try:
            while dispatched < run.steps_per_epoch:
                batch = next(work)
                underway.state, metrics = training.step(underway.state, *training.constants, batch)
                dispatched += metrics["loss"].size
                pending.append(metrics)
                if len(pending) > 1:
                    read(bar)
                if underway.interruption.requested():
                    break
        finally:
            while pending:
                read(bar)
    if dispatched < run.steps_per_epoch:
        raise Interrupted
    measured = [step for step in done.begun if step]
    if not measured:
        raise RunError(
            f"no step of epoch {epoch} had a finite loss and gradients: train with a smaller "
            "--optimizer.learning-rate, in another --workdir"
        )
    losses, dices = zip(*measured, strict=True)
    return {
        "epoch": epoch,
        "step": epoch * run.steps_per_epoch,
        "train_loss": float(np.mean(losses)),
        "train_dice": float(np.mean(dices)),
        "skipped": len(done.begun) - len(measured),
        **rates(),
    }


def _stop_at_non_finite(underway: Underway) -> str:
    """Saves the state before the step that was not applied, and its batch; returns a report."""
    run = underway.run
    underway.state = underway.state._replace(halted=replicate(jnp.zeros((), bool), run.mesh))
    underway.save()
    underway.saved.wait()
    step = int(underway.state.step)
    batches = training_batches(
        run.dataset,
        run.split.train,
        dataclasses.replace(run.config.data, workers=0),
        run.config.augmentation,
        channels=run.config.model.in_channels,
        seed=run.config.seed,
        batch_size=run.config.schedule.batch_size,
        start_step=step,
        total_steps=step + 1,
    )
    with contextlib.closing(batches):
        batch = next(batches)
    names = [run.dataset.names[record] for record in batch.record]
    path = underway.workdir / "non_finite" / f"step_{step + 1}.npz"
    if is_first():
        content = io.BytesIO()
        np.savez(content, image=batch.image, mask=batch.mask, name=names)
        write_atomically(path, content.getvalue())
    return (
        f"loss or gradients of step {step + 1} are not finite; the state before it is saved, its "
        f"batch is {path} ({', '.join(names)}): train with a smaller --optimizer.learning-rate in "
        "another --workdir, or leave such steps out with --resume --schedule.non-finite skip"
    )


def _decide(
    run: Run, state: TrainState, done: Progressed, numbers: dict[str, float]
) -> tuple[TrainState, Progressed]:
    """Lets the validation Dice lower the learning rates and count towards stopping."""
    dice = numbers["validation_dice"]
    rates = {group: float(rate) for group, rate in state.learning_rates.items()}
    plateau, rates = done.plateau.update(dice, rates, run.config.schedule)
    learning_rates = replicate(
        {group: jnp.asarray(rate, jnp.float32) for group, rate in rates.items()}, run.mesh
    )
    stopping = done.stopping.update(dice, int(numbers["epoch"]))
    return (
        state._replace(learning_rates=learning_rates),
        Progressed([*done.history, numbers], plateau, stopping),
    )


def _variables(state: TrainState) -> Variables:
    return Variables(state.params, state.batch_stats)


def _training(state: TrainState) -> dict[str, Any]:
    """Returns what a checkpoint of the state holds besides the variables."""
    return {
        "step": state.step,
        "opt_state": state.opt_state,
        "learning_rates": state.learning_rates,
    }


def _split_method(config: TrainConfig) -> dict[str, Any]:
    return {
        "seed": config.seed,
        "validation_fraction": config.data.validation_fraction,
        "folds": config.data.folds,
        "fold": config.data.fold,
    }


def _check_same_split(run: Run, workdir: Path) -> None:
    manifest = workdir / "split.json"
    if splits.read_manifest(manifest, run.dataset.names) != run.split:
        raise InputError(
            f"{manifest} differs from the split of this data set: resume with the data that the "
            "run began with, or choose another --workdir"
        )


def _write_start(run: Run, workdir: Path) -> None:
    write_atomically(workdir / "config.json", json_bytes(to_dict(run.config)))
    splits.write_manifest(
        workdir / "split.json", run.split, run.dataset.names, method=_split_method(run.config)
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
    """Draws validation images, from the worst Dice to the best, with the best checkpoint."""
    from fetal_flax.evaluation import pictures
    from fetal_flax.evaluation.metrics import segmentation_metrics
    from fetal_flax.inference.predictor import Predictor

    predictor = Predictor.from_checkpoint(workdir)
    records = [run.dataset.record(i) for i in run.split.validation]
    masks = predictor.masks([record.image for record in records])
    truths = [record.mask > 0 for record in records]
    dices = [
        segmentation_metrics(mask, truth)["dice"] for mask, truth in zip(masks, truths, strict=True)
    ]
    order = np.argsort(dices)
    chosen = order[np.linspace(0, len(order) - 1, min(SHEET_IMAGES, len(order))).astype(int)]
    pictures.overlay_sheet(
        workdir / "validation.png",
        [records[i].image for i in chosen],
        [masks[i] for i in chosen],
        [truths[i] for i in chosen],
        [records[i].name for i in chosen],
        [dices[i] for i in chosen],
    )
