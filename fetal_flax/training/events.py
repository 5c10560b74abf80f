"""What happens in a run, as values that its listeners are told in the order of their happening.

A listener is any function of one event. Terminal, log files and profiler are listeners
(training/logging/), and whoever calls `run.train` can add more: an exception that a listener raises
ends the run as one of its own would.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

EpochNumbers = Mapping[str, float]
"""One epoch's numbers by name: `epoch`, `step`, losses, Dices, rates and times."""


@dataclasses.dataclass(frozen=True)
class Message:
    """Something that whoever watches should know."""

    text: str


@dataclasses.dataclass(frozen=True)
class EpochBegan:
    """An epoch's first training step is next, or the first after an interruption."""

    epoch: int
    """From 1."""
    steps: int
    """Training steps of the whole epoch."""
    steps_done: int
    """Of them before an interruption."""


@dataclasses.dataclass(frozen=True)
class CallBegan:
    """A call of some training steps is next."""

    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class CallDispatched:
    """The devices have been given a call's steps, and may not have done them yet."""

    results: Any


@dataclasses.dataclass(frozen=True)
class CallDone:
    """A call's steps are done; nothing has been made of their numbers yet."""


@dataclasses.dataclass(frozen=True)
class StepDone:
    """A training step's numbers."""

    step: int
    """From 1, counted from the start of the run."""
    loss: float
    dice: float
    applied: bool
    """False where loss or gradients were not finite and the step was skipped."""
    images_per_second: float
    """Of this epoch so far."""
    waiting: float
    """Share of this epoch's time so far that was spent in waiting for batches."""


@dataclasses.dataclass(frozen=True)
class ValidationBegan:
    """An epoch's training steps are done, and it is validated next."""

    epoch: int


@dataclasses.dataclass(frozen=True)
class EpochDone:
    """An epoch is trained, validated, and being saved."""

    history: Sequence[EpochNumbers]
    """All epochs of the run; the last is this one."""
    is_best: bool


@dataclasses.dataclass(frozen=True)
class CheckpointBegan:
    """A checkpoint is saved next."""

    epochs: int
    """Complete epochs."""
    steps_done: int
    """Steps of the next."""


Event = (
    Message
    | EpochBegan
    | CallBegan
    | CallDispatched
    | CallDone
    | StepDone
    | ValidationBegan
    | EpochDone
    | CheckpointBegan
)
Listener = Callable[[Event], None]
