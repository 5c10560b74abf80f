"""The epochs of a run, from wherever it stands to its end, and all that can stop them."""

import collections
import contextlib
import dataclasses
import functools
import io
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fetal_flax.checkpoints import TrainingCheckpoints
from fetal_flax.config import DataConfig, ScheduleConfig
from fetal_flax.data.pipeline import (
    Batch,
    DeviceBatches,
    TrainingOrder,
    WorkerDiedError,
    prefetch_to_device,
    split_into_calls,
    stack_steps,
    training_batches,
)
from fetal_flax.data.resident import training_plans
from fetal_flax.errors import Interrupted, RunError
from fetal_flax.files import write_atomically
from fetal_flax.models.functional import Variables
from fetal_flax.training.distributed import is_first, shard
from fetal_flax.training.interruption import Interruption
from fetal_flax.training.preparation import Run
from fetal_flax.training.progress import Bar, Logs, Progress, traced
from fetal_flax.training.schedule import EarlyStopping, Plateau, rate_factor
from fetal_flax.training.sharding import plan_sharding, replicate
from fetal_flax.training.step import TrainState, network_of
from fetal_flax.training.validation import Validation


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

    def ended(self, schedule: ScheduleConfig) -> bool:
        """Whether there is no epoch left, or early stopping has come."""
        return self.epochs >= schedule.epochs or self.stopping.should_stop(schedule)

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


class Training(NamedTuple):
    """What an epoch is made of: `state, metrics = step(state, *constants, next(work))`."""

    step: Callable[..., Any]
    constants: tuple[Any, ...]
    work: DeviceBatches
    """The batches of several steps, or a plan of them, at a time."""
    steps: int
    """Training steps that one call of `step` does; in an epoch's first and last, maybe fewer."""


@contextlib.contextmanager
def open_training(run: Run, start_step: int, total_steps: int) -> Iterator[Training]:
    """Opens the steps from `start_step` up to `total_steps`, an epoch's end."""
    config, steps = run.config, run.steps_per_dispatch
    calls = split_into_calls(steps, run.steps_per_epoch, start_step, total_steps)
    if run.resident is None:
        batches = _batches(run, config.data, start_step, total_steps, shard())
        on_host = stack_steps(batches, calls)
        any_number, constants = run.steps.train_several, (run.pos_weight_on_devices,)
    else:
        order = TrainingOrder(
            run.split.train, config.augmentation, config.seed, config.schedule.batch_size
        )
        on_host = training_plans(order, config.data.image_size, calls, shard())
        any_number, constants = run.steps.train_resident, (run.pos_weight_on_devices, run.resident)

    def step(*arguments: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        whole = len(arguments[-1].record) == steps
        return (run.train_step if whole else any_number)(*arguments)

    work = prefetch_to_device(on_host, plan_sharding(run.mesh))
    with contextlib.closing(work):
        yield Training(step, constants, work, steps)


def _batches(
    run: Run, data: DataConfig, start_step: int, total_steps: int, shard: tuple[int, int]
) -> Generator[Batch, None, None]:
    """Returns the host's training batches of the steps from `start_step` up to `total_steps`."""
    return training_batches(
        run.dataset,
        run.split.train,
        data,
        run.config.augmentation,
        channels=run.config.model.in_channels,
        seed=run.config.seed,
        batch_size=run.config.schedule.batch_size,
        start_step=start_step,
        total_steps=total_steps,
        shard=shard,
    )


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

    @functools.cached_property
    def validation(self) -> Validation:
        """The run's, which keeps what it needs again."""
        return Validation(self.run)

    def save(self, score: float | None = None) -> None:
        """Saves the state in the background, after an epoch with its score, or in between."""
        self.saved.save(
            self.done.epochs,
            network_of(self.state),
            training_of(self.state),
            self.run.description(self.done.to_json()),
            score,
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


def train_epochs(underway: Underway, traces: Path | None) -> None:
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
    while not underway.done.ended(schedule):
        start = time.perf_counter()
        numbers = _train_epoch(underway, training)
        numbers |= underway.validation.measure(network_of(underway.state), underway.interruption)
        numbers |= {
            "learning_rate": _last_learning_rate(run, underway.state),
            "seconds": time.perf_counter() - start,
        }
        underway.state, underway.done = _decide(run, underway.state, underway.done, numbers)
        underway.save(_score(run, numbers))
        if underway.logs:
            underway.logs.epoch(underway.done.history)
        is_best = underway.done.stopping.best_epoch == underway.done.epochs
        underway.progress.epoch(numbers, is_best=is_best)


def _train_epoch(underway: Underway, training: Training) -> dict[str, float]:
    """Runs an epoch's steps; where a call does one, metrics are read one late: no device waits."""
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
                # A call of several steps is waited for: a signal shall not wait for two.
                if len(pending) > (training.steps == 1):
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
    in_threads = dataclasses.replace(run.config.data, workers=0)
    with contextlib.closing(_batches(run, in_threads, step, step + 1, (0, 1))) as batches:
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
    """Lets the validation lower the learning rates and count towards stopping."""
    score = _score(run, numbers)
    rates = {group: float(rate) for group, rate in state.learning_rates.items()}
    plateau = done.plateau
    if run.config.schedule.decay == "plateau":
        plateau, rates = plateau.update(score, rates, run.config.schedule)
    learning_rates = replicate(
        {group: jnp.asarray(rate, jnp.float32) for group, rate in rates.items()}, run.mesh
    )
    stopping = done.stopping.update(score, int(numbers["epoch"]))
    return (
        state._replace(learning_rates=learning_rates),
        Progressed([*done.history, numbers], plateau, stopping),
    )


def _score(run: Run, numbers: dict[str, float]) -> float:
    """Returns what is to rise from epoch to epoch."""
    return numbers[f"validation_{run.config.schedule.select_by}"]


def _last_learning_rate(run: Run, state: TrainState) -> float:
    """Returns the rate that the last step took."""
    rate = float(state.learning_rates["main"])
    factor = rate_factor(run.config.schedule, run.steps_per_epoch)
    return rate if factor is None else rate * float(np.asarray(factor(int(state.step) - 1)))


def training_of(state: TrainState) -> dict[str, Any]:
    """Returns what a checkpoint of the state holds besides the network."""
    training = {
        "step": state.step,
        "opt_state": state.opt_state,
        "learning_rates": state.learning_rates,
    }
    if state.averages:
        # The network is the average; this is what goes on learning.
        arrays = state.params | state.batch_stats
        training["averaged_from"] = {name: arrays[name] for name in state.averages}
    return training


def restored_state(state: TrainState, network: Variables, training: dict[str, Any]) -> TrainState:
    """Returns `state` with what a checkpoint holds: the inverse of `network_of`, `training_of`."""
    training = dict(training)
    learning = training.pop("averaged_from", {})
    arrays = network.params | network.batch_stats
    return state._replace(
        params={name: learning.get(name, a) for name, a in network.params.items()},
        batch_stats={
            name: learning.get(name, array) for name, array in network.batch_stats.items()
        },
        averages={name: arrays[name] for name in learning},
        **training,
    )
