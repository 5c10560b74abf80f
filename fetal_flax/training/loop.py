"""A training run from its config to its workdir.

WORKDIR/config.json          the whole config
WORKDIR/split.json           which image is on which side
WORKDIR/run.json             what was found out at the start: pos_weight, versions, devices
WORKDIR/checkpoints/         the last two epochs and the best
WORKDIR/metrics.csv          a row per epoch; tensorboard/ has the same and every step
WORKDIR/curves.png           loss, Dice and learning rate over the epochs
WORKDIR/validation.png       validation images with the outlines of truth and prediction
WORKDIR/profile/             traces of a few steps, with --profile
"""

import collections
import contextlib
import dataclasses
import functools
import json
import platform
import time
from collections.abc import Iterator
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
from fetal_flax.data.pipeline import (
    DeviceBatches,
    TrainingOrder,
    evaluation_batches,
    foreground_fraction,
    prefetch_to_device,
    steps_per_epoch,
    training_batches,
)
from fetal_flax.data.resident import (
    Resident,
    evaluation_plan,
    load_resident,
    training_plans,
)
from fetal_flax.errors import InputError
from fetal_flax.evaluation import pictures
from fetal_flax.evaluation.metrics import segmentation_metrics
from fetal_flax.files import json_bytes, write_atomically
from fetal_flax.inference.predictor import Predictor
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables
from fetal_flax.training.progress import Bar, Logs, Progress, traced
from fetal_flax.training.schedule import EarlyStopping, Plateau
from fetal_flax.training.sharding import (
    batch_sharding,
    check_batch_size,
    create_mesh,
    plan_sharding,
    replicated,
)
from fetal_flax.training.step import Steps, TrainState, create_state, create_steps

SHEET_IMAGES = 12
# Settings that may change when a run is resumed: they don't change what a step computes.
RESUMABLE = (
    "schedule.epochs",
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
    steps_per_epoch: int
    variables: Variables
    resident: Resident | None
    """The images, where they are on the devices."""

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
    """Where a run stands between two epochs, besides its arrays."""

    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    plateau: Plateau = dataclasses.field(default_factory=Plateau)
    stopping: EarlyStopping = dataclasses.field(default_factory=EarlyStopping)

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
    pos_weight = config.loss.pos_weight
    if pos_weight == "auto":
        foreground = foreground_fraction(dataset, split.train, config.data.image_size)
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
        steps=create_steps(config, float(pos_weight), mesh),
        steps_per_epoch=epoch_steps,
        variables=variables,
        resident=load_resident(dataset, config.data.image_size, replicated(mesh))
        if config.data.backend == "device"
        else None,
    )


def train(
    config: TrainConfig, workdir: Path, *, resume: bool = False, profile: bool = False
) -> Path:
    """Trains to the last epoch or until validation Dice stops rising.

    Args:
        config: The run.
        workdir: Where everything goes; must hold no run yet, unless `resume`.
        resume: Go on behind the last complete epoch in `workdir`.
        profile: Trace a few steps into `workdir`/profile.

    Returns:
        `workdir`.

    Raises:
        InputError: Settings, files or data can't be used; the message says which.
    """
    check_workdir(config, workdir, resume=resume)
    run = prepare(config)
    progress = Progress(config.schedule.epochs)
    progress.say(describe(run))
    state = create_state(config, run.variables, run.mesh)
    saved = TrainingCheckpoints(workdir)
    with contextlib.closing(saved):
        restored = saved.restore_latest(_variables(state), _training(state)) if resume else None
        done = Progressed()
        if restored is not None:
            variables, training, description = restored
            state = TrainState(**variables._asdict(), **training)
            done = Progressed.from_json(dict(description.progress))
            _check_same_split(run, workdir)
            progress.say(f"resuming behind epoch {done.epochs}")
        _write_start(run, workdir)
        logs = Logs(workdir, int(state.step))
        traces = workdir / "profile" if profile else None
        done = _train_epochs(run, state, done, saved, logs, progress, traces)
    pictures.training_curves(workdir / "curves.png", done.history)
    _write_sheet(run, workdir)
    progress.say(
        f"best validation Dice {done.stopping.best:.4f} in epoch {done.stopping.best_epoch}; "
        f"curves.png, validation.png, metrics.csv and checkpoints are in {workdir}"
    )
    return workdir


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

    step: jax.stages.Wrapped
    constants: tuple[Any, ...]
    work: DeviceBatches
    """A batch, or a plan of several, at a time."""
    steps: int
    """Training steps that one call of `step` does."""


@contextlib.contextmanager
def open_training(run: Run, start_step: int, total_steps: int) -> Iterator[Training]:
    """Opens the steps from `start_step` up to `total_steps`, both starts of an epoch."""
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
        )
        work = prefetch_to_device(batches, batch_sharding(run.mesh))
        training = Training(run.steps.train, (), work, steps=1)
    else:
        steps = _steps_per_dispatch(run)
        order = TrainingOrder(
            run.split.train, config.augmentation, config.seed, config.schedule.batch_size
        )
        plans = training_plans(
            order,
            config.data.image_size,
            steps=steps,
            start_step=start_step,
            total_steps=total_steps,
        )
        sharding = plan_sharding(run.mesh)
        if steps == 1:
            # Taken in a call of its own: in the step's, XLA's CPU backend repeats the warp for
            # each of its readers and takes twenty times as long.
            take = functools.partial(run.steps.take, run.resident)
            work = prefetch_to_device(plans, sharding, prepare=take)
            training = Training(run.steps.train, (), work, steps)
        else:
            work = prefetch_to_device(plans, sharding)
            training = Training(run.steps.train_resident, (run.resident,), work, steps)
    with contextlib.closing(work):
        yield training


def _steps_per_dispatch(run: Run) -> int:
    """Returns the largest divisor of an epoch's steps that the setting allows."""
    on_cpu = run.mesh.devices.flat[0].platform == "cpu"
    default = 1 if on_cpu else run.steps_per_epoch
    at_most = min(run.config.data.steps_per_dispatch or default, run.steps_per_epoch)
    return next(n for n in range(at_most, 0, -1) if run.steps_per_epoch % n == 0)


def evaluate(run: Run, variables: Variables) -> dict[str, float]:
    """Returns mean loss and Dice over the validation split, every image counted once."""
    losses, dices = [], []
    for metrics, valid in _evaluated_batches(run, variables):
        losses += [float(metrics["loss"])] * int(valid.sum())
        dices += np.asarray(metrics["dice"])[valid].tolist()
    return {"validation_loss": float(np.mean(losses)), "validation_dice": float(np.mean(dices))}


def _evaluated_batches(
    run: Run, variables: Variables
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Yields the metrics of each batch, and which of its images count."""
    config, batch_size = run.config, run.config.schedule.batch_size
    if run.resident is not None:
        plan = evaluation_plan(run.split.validation, batch_size)
        on_device = jax.device_put(plan, plan_sharding(run.mesh))
        metrics = jax.device_get(run.steps.evaluate_resident(variables, run.resident, on_device))
        for step, record in enumerate(plan.record):
            yield {name: values[step] for name, values in metrics.items()}, record >= 0
        return
    batches = evaluation_batches(
        run.dataset,
        run.split.validation,
        config.data,
        channels=config.model.in_channels,
        batch_size=batch_size,
    )
    with contextlib.closing(prefetch_to_device(batches, batch_sharding(run.mesh))) as on_device:
        for batch in on_device:
            yield run.steps.evaluate(variables, batch), np.asarray(batch.valid)


def _train_epochs(
    run: Run,
    state: TrainState,
    done: Progressed,
    saved: TrainingCheckpoints,
    logs: Logs,
    progress: Progress,
    traces: Path | None,
) -> Progressed:
    schedule = run.config.schedule
    total_steps = schedule.epochs * run.steps_per_epoch
    with (
        contextlib.closing(logs),
        open_training(run, int(state.step), total_steps) as opened,
        traced(opened.step, traces) as step,
    ):
        training = opened._replace(step=step)
        while done.epochs < schedule.epochs and not done.stopping.should_stop(schedule):
            start = time.perf_counter()
            state, numbers = _train_epoch(run, state, training, done.epochs + 1, logs, progress)
            numbers |= evaluate(run, _variables(state))
            numbers |= {
                "learning_rate": float(state.learning_rates["main"]),
                "seconds": time.perf_counter() - start,
            }
            state, done = _decide(run, state, done, numbers)
            saved.save(
                done.epochs,
                _variables(state),
                _training(state),
                run.description(done.to_json()),
                numbers["validation_dice"],
            )
            logs.epoch(done.history)
            progress.epoch(numbers, is_best=done.stopping.best_epoch == done.epochs)
    return done


def _train_epoch(
    run: Run,
    state: TrainState,
    training: Training,
    epoch: int,
    logs: Logs,
    progress: Progress,
) -> tuple[TrainState, dict[str, float]]:
    """Runs one epoch's steps, reading metrics one call late so that dispatch never waits."""
    first_step = (epoch - 1) * run.steps_per_epoch
    batch_size = run.config.schedule.batch_size
    pending: collections.deque[dict[str, jax.Array]] = collections.deque()
    losses: list[float] = []
    dices: list[float] = []
    work = training.work
    waited, start = work.waited_seconds, time.perf_counter()

    def read(bar: Bar) -> None:
        metrics = jax.device_get(pending.popleft())
        for loss, dice in zip(*map(np.atleast_1d, (metrics["loss"], metrics["dice"])), strict=True):
            losses.append(float(loss))
            dices.append(float(dice))
            logs.step(first_step + len(losses), losses[-1], dices[-1])
        elapsed = time.perf_counter() - start
        bar.show(
            loss=losses[-1],
            dice=dices[-1],
            images_per_second=len(losses) * batch_size / elapsed,
            waiting=(work.waited_seconds - waited) / elapsed,
        )

    with progress.bar(epoch, run.steps_per_epoch) as bar:
        for _ in range(run.steps_per_epoch // training.steps):
            state, metrics = training.step(state, *training.constants, next(work))
            pending.append(metrics)
            bar.advance(training.steps)
            if len(pending) > 1:
                read(bar)
        while pending:
            read(bar)
    elapsed = time.perf_counter() - start
    return state, {
        "epoch": epoch,
        "step": first_step + run.steps_per_epoch,
        "train_loss": float(np.mean(losses)),
        "train_dice": float(np.mean(dices)),
        "images_per_second": run.steps_per_epoch * batch_size / elapsed,
        "waiting": (work.waited_seconds - waited) / elapsed,
    }


def _decide(
    run: Run, state: TrainState, done: Progressed, numbers: dict[str, float]
) -> tuple[TrainState, Progressed]:
    """Lets the validation Dice lower the learning rates and count towards stopping."""
    dice = numbers["validation_dice"]
    rates = {group: float(rate) for group, rate in state.learning_rates.items()}
    plateau, rates = done.plateau.update(dice, rates, run.config.schedule)
    learning_rates = {
        group: jax.device_put(jnp.asarray(rate, jnp.float32), replicated(run.mesh))
        for group, rate in rates.items()
    }
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


def _write_sheet(run: Run, workdir: Path) -> None:
    """Draws validation images, from the worst Dice to the best, with the best checkpoint."""
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
