"""What changes in a run from step to step, and how a checkpoint holds it."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fetal_flax.checkpoints import TrainingCheckpoints
from fetal_flax.config import ScheduleConfig
from fetal_flax.models.functional import Variables
from fetal_flax.training.events import CheckpointBegan, Event, Listener
from fetal_flax.training.interruption import Interruption
from fetal_flax.training.schedule import EarlyStopping, ReduceLROnPlateau
from fetal_flax.training.setup import Setup
from fetal_flax.training.step import TrainState, network_of
from fetal_flax.training.validation import Validation


@dataclasses.dataclass(frozen=True)
class RunProgress:
    """How far a run is, besides its arrays."""

    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """The numbers of each complete epoch."""
    plateau: ReduceLROnPlateau = dataclasses.field(default_factory=ReduceLROnPlateau)
    stopping: EarlyStopping = dataclasses.field(default_factory=EarlyStopping)
    partial_epoch: list[tuple[float, float] | None] = dataclasses.field(default_factory=list)
    """Loss and Dice of the steps done of the next epoch; None of a step that was skipped."""

    @property
    def epochs(self) -> int:
        """Complete epochs."""
        return len(self.history)

    def ended(self, schedule: ScheduleConfig) -> bool:
        """Returns whether there is no epoch left, or early stopping has come."""
        return self.epochs >= schedule.epochs or self.stopping.should_stop(schedule)

    def to_json(self) -> dict[str, Any]:
        """Returns the progress for a checkpoint's description."""
        values = dataclasses.asdict(self)
        values["begun"] = values.pop("partial_epoch")
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunProgress":
        """Returns the progress from a checkpoint's description."""
        return cls(
            list(values["history"]),
            ReduceLROnPlateau(**values["plateau"]),
            EarlyStopping(**values["stopping"]),
            [step and (step[0], step[1]) for step in values["begun"]],
        )


@dataclasses.dataclass
class TrainingSession:
    """A run on its way: what changes from step to step, and who is told."""

    setup: Setup
    workdir: Path
    state: TrainState
    progress: RunProgress
    checkpoints: TrainingCheckpoints
    interruption: Interruption
    listeners: Sequence[Listener]

    @functools.cached_property
    def validation(self) -> Validation:
        """The run's, which keeps what it needs again."""
        return Validation(self.setup)

    def tell(self, event: Event) -> None:
        """Tells every listener."""
        for listener in self.listeners:
            listener(event)

    def save(self, score: float | None = None) -> None:
        """Saves the state in the background, after an epoch with its score, or in between."""
        steps_done = len(self.progress.partial_epoch)
        self.tell(CheckpointBegan(self.progress.epochs, steps_done))
        self.checkpoints.save(
            self.progress.epochs,
            network_of(self.state),
            training_of(self.state),
            self.setup.description(self.progress.to_json()),
            score,
            begun=steps_done,
        )


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
