"""The epochs of a run, from wherever it stands to its end, and all that can stop them."""

import collections
import contextlib
import dataclasses
import io
import time
from collections.abc import Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fetal_flax._util.files import write_atomically
from fetal_flax._util.pipeline import made_in_thread
from fetal_flax.config import DataConfig
from fetal_flax.data.batch import Batch
from fetal_flax.data.device_loader import training_recipes
from fetal_flax.data.host_loader import (
    DeviceBatches,
    WorkerDiedError,
    prefetch_to_device,
    stack_steps,
    training_batches,
)
from fetal_flax.data.samples import TrainingOrder, split_into_calls
from fetal_flax.errors import Interrupted, RunError
from fetal_flax.training.distributed import is_first, shard
from fetal_flax.training.events import (
    CallBegan,
    CallDispatched,
    CallDone,
    EpochBegan,
    EpochDone,
    Message,
    StepDone,
    ValidationBegan,
)
from fetal_flax.training.schedule import rate_factor
from fetal_flax.training.session import RunProgress, TrainingSession
from fetal_flax.training.setup import Setup
from fetal_flax.training.sharding import replicate, step_sharding
from fetal_flax.training.step import TrainState, network_of


class _NonFinite(Exception):  # noqa: N818  It leaves this module as a RunError.
    """A step was not applied, and the run is to stop."""


def train_epochs(session: TrainingSession) -> None:
    """Trains up to the last epoch, or until validation no longer improves.

    Raises:
        Interrupted: The run was asked to stop, and is saved.
        RunError: It can't go on.
    """
    setup, interruption = session.setup, session.interruption
    total_steps = setup.config.schedule.epochs * setup.steps_per_epoch
    interruption.defer()
    died_at = None
    try:
        while True:
            try:
                with open_batches(setup, int(session.state.step), total_steps) as batches:
                    while not session.progress.ended(setup.config.schedule):
                        _train_epoch(session, batches)
                return
            except WorkerDiedError as error:
                if interruption.noticed:
                    raise Interrupted from None
                died_before, died_at = died_at, int(session.state.step)
                if died_at == died_before:
                    raise RunError(
                        f"data workers keep ending before step {died_at + 1} ({error}): see to "
                        "their memory and to /dev/shm, or go on with --resume --data.workers 0"
                    ) from None
                session.tell(Message("a data worker ended; starting new ones"))
    except Interrupted:
        session.save()
        session.checkpoints.wait()
        raise Interrupted(
            f"stopped after step {int(session.state.step)}, and saved: go on with --resume "
            f"--workdir {session.workdir}"
        ) from None
    except _NonFinite:
        raise RunError(_stop_at_non_finite(session)) from None


@contextlib.contextmanager
def open_batches(setup: Setup, start_step: int, total_steps: int) -> Iterator[DeviceBatches]:
    """Opens what `setup.train_chunk` takes, a call's steps at a time: batches, or recipes.

    Args:
        setup: The run.
        start_step: The first step.
        total_steps: The step to stop before, an epoch's end.
    """
    config = setup.config
    calls = split_into_calls(setup.steps_per_call, setup.steps_per_epoch, start_step, total_steps)
    if setup.device_dataset is None:
        on_host = stack_steps(
            _host_batches(setup, config.data, start_step, total_steps, shard()), calls
        )
    else:
        order = TrainingOrder(
            setup.split.train, config.augmentation, config.seed, config.schedule.batch_size
        )
        # Of a whole epoch it takes some 27 ms to make, in which a GPU would wait for it.
        on_host = made_in_thread(training_recipes(order, config.data.image_size, calls, shard()))
    with contextlib.closing(prefetch_to_device(on_host, step_sharding(setup.mesh))) as batches:
        yield batches


def _host_batches(
    setup: Setup, data: DataConfig, start_step: int, total_steps: int, shard: tuple[int, int]
) -> Generator[Batch, None, None]:
    """Returns the host's training batches of the steps from `start_step` up to `total_steps`."""
    return training_batches(
        setup.dataset,
        setup.split.train,
        data,
        setup.config.augmentation,
        channels=setup.config.model.in_channels,
        seed=setup.config.seed,
        batch_size=setup.config.schedule.batch_size,
        start_step=start_step,
        total_steps=total_steps,
        shard=shard,
    )


def _train_epoch(session: TrainingSession, batches: DeviceBatches) -> None:
    """Trains an epoch, or what is left of it, validates, decides and saves."""
    start = time.perf_counter()
    numbers = _train_steps(session, batches)
    session.tell(ValidationBegan(int(numbers["epoch"])))
    numbers |= session.validation.measure(network_of(session.state), session.interruption)
    numbers |= {
        "learning_rate": _last_learning_rate(session.setup, session.state),
        "seconds": time.perf_counter() - start,
    }
    _decide(session, numbers)
    session.save(_score(session.setup, numbers))
    is_best = session.progress.stopping.best_epoch == session.progress.epochs
    session.tell(EpochDone(session.progress.history, is_best))


def _train_steps(session: TrainingSession, batches: DeviceBatches) -> dict[str, float]:
    """Does an epoch's steps; where a call does one, metrics are read one late: no device waits."""
    setup, partial_epoch = session.setup, session.progress.partial_epoch
    epoch, steps_before = session.progress.epochs + 1, len(partial_epoch)
    pending: collections.deque[dict[str, jax.Array]] = collections.deque()
    waited, start = batches.waited_seconds, time.perf_counter()

    def rates() -> dict[str, float]:
        elapsed = time.perf_counter() - start
        images = (len(partial_epoch) - steps_before) * setup.config.schedule.batch_size
        return {
            "images_per_second": images / elapsed,
            "waiting": (batches.waited_seconds - waited) / elapsed,
        }

    def read() -> None:
        metrics = jax.device_get(pending.popleft())
        session.tell(CallDone())
        _count_steps(session, metrics, rates)

    session.tell(EpochBegan(epoch, setup.steps_per_epoch, steps_before))
    dispatched = steps_before
    try:
        while dispatched < setup.steps_per_epoch:
            items = next(batches)
            session.tell(CallBegan((session.state, items)))
            session.state, metrics = setup.train_chunk(session.state, items)
            session.tell(CallDispatched((session.state, metrics)))
            dispatched += metrics["loss"].size
            pending.append(metrics)
            # A call of several steps is waited for: a signal shall not wait for two.
            if len(pending) > (setup.steps_per_call == 1):
                read()
            if session.interruption.requested():
                break
    finally:
        while pending:
            read()
    if dispatched < setup.steps_per_epoch:
        raise Interrupted
    measured = [step for step in partial_epoch if step]
    if not measured:
        raise RunError(
            f"no step of epoch {epoch} had a finite loss and gradients: train with a smaller "
            "--optimizer.learning-rate, in another --workdir"
        )
    losses, dices = zip(*measured, strict=True)
    return {
        "epoch": epoch,
        "step": epoch * setup.steps_per_epoch,
        "train_loss": float(np.mean(losses)),
        "train_dice": float(np.mean(dices)),
        "skipped": len(partial_epoch) - len(measured),
        **rates(),
    }


def _count_steps(session: TrainingSession, metrics: dict[str, Any], rates: Any) -> None:
    """Notes what the steps of a call have measured.

    Raises:
        _NonFinite: One of them was not applied, and the run is to stop.
    """
    setup, progress = session.setup, session.progress
    for loss, dice, applied in zip(
        *(np.atleast_1d(metrics[name]) for name in ("loss", "dice", "applied")), strict=True
    ):
        if not applied and setup.config.schedule.non_finite == "stop":
            raise _NonFinite
        progress.partial_epoch.append((float(loss), float(dice)) if applied else None)
        step = progress.epochs * setup.steps_per_epoch + len(progress.partial_epoch)
        session.tell(StepDone(step, float(loss), float(dice), bool(applied), **rates()))


def _stop_at_non_finite(session: TrainingSession) -> str:
    """Saves the state before the step that was not applied, and its batch; returns a report."""
    setup = session.setup
    session.state = session.state._replace(halted=replicate(jnp.zeros((), bool), setup.mesh))
    session.save()
    session.checkpoints.wait()
    step = int(session.state.step)
    in_threads = dataclasses.replace(setup.config.data, workers=0)
    with contextlib.closing(_host_batches(setup, in_threads, step, step + 1, (0, 1))) as batches:
        batch = next(batches)
    names = [setup.dataset.names[index] for index in batch.index]
    path = session.workdir / "non_finite" / f"step_{step + 1}.npz"
    if is_first():
        content = io.BytesIO()
        np.savez(content, image=batch.image, mask=batch.mask, name=names)
        write_atomically(path, content.getvalue())
    return (
        f"loss or gradients of step {step + 1} are not finite; the state before it is saved, its "
        f"batch is {path} ({', '.join(names)}): train with a smaller --optimizer.learning-rate in "
        "another --workdir, or leave such steps out with --resume --schedule.non-finite skip"
    )


def _decide(session: TrainingSession, numbers: dict[str, float]) -> None:
    """Lets the validation lower the learning rates and count towards stopping."""
    setup, progress, schedule = session.setup, session.progress, session.setup.config.schedule
    score = _score(setup, numbers)
    rates = {group: float(rate) for group, rate in session.state.learning_rates.items()}
    plateau = progress.plateau
    if schedule.decay == "plateau":
        plateau, rates = plateau.update(score, rates, schedule)
    learning_rates = replicate(
        {group: jnp.asarray(rate, jnp.float32) for group, rate in rates.items()}, setup.mesh
    )
    stopping = progress.stopping.update(score, int(numbers["epoch"]))
    session.state = session.state._replace(learning_rates=learning_rates)
    session.progress = RunProgress([*progress.history, numbers], plateau, stopping)


def _score(setup: Setup, numbers: dict[str, float]) -> float:
    """Returns what is to rise from epoch to epoch."""
    return numbers[f"validation_{setup.config.schedule.select_by}"]


def _last_learning_rate(setup: Setup, state: TrainState) -> float:
    """Returns the rate that the last step took."""
    rate = float(state.learning_rates["main"])
    factor = rate_factor(setup.config.schedule, setup.steps_per_epoch)
    return rate if factor is None else rate * float(np.asarray(factor(int(state.step) - 1)))
