"""Log files of a run: TensorBoard's, and a CSV with a row per epoch."""

import time
from collections.abc import Sequence
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event as FileEvent  # pyright: ignore
from tensorboardX.proto.event_pb2 import SessionLog  # pyright: ignore
from tensorboardX.summary import scalar

from fetal_flax._util.files import csv_bytes, write_atomically
from fetal_flax.training.events import EpochDone, EpochNumbers, Event, StepDone

FLUSH_SECONDS = 30
"""How old what TensorBoard sees may be."""


class LogFiles:
    """TensorBoard event files and `metrics.csv` of a run.

    Args:
        workdir: The run's folder.
        next_step: The step that the run goes on with; a resumed run replaces what an interrupted
            one logged from there on.
        history: The epochs that are complete, which an interrupted run may not have got into the
            CSV.

    Raises:
        OSError: The event file can't be written.
        InputError: The CSV can't be written.
    """

    def __init__(self, workdir: Path, next_step: int, history: Sequence[EpochNumbers]):
        self._csv = workdir / "metrics.csv"
        self._flush_at = 0.0
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # Not through SummaryWriter: where its thread can't write, the run would wait for ever.
        self._events = EventsWriter(str(folder / "events"))
        self._write(FileEvent(step=next_step, session_log=SessionLog(status=SessionLog.START)))
        self._write_csv(history)

    def __call__(self, event: Event) -> None:
        """Listens to a run."""
        if isinstance(event, StepDone) and event.applied:
            self._write_step(event)
        elif isinstance(event, EpochDone):
            self._write_epoch(event.history)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._events.close()

    def _write_step(self, event: StepDone) -> None:
        self._write_scalar("step/train_loss", event.loss, event.step)
        self._write_scalar("step/train_dice", event.dice, event.step)
        if time.monotonic() > self._flush_at:
            self._events.flush()
            self._flush_at = time.monotonic() + FLUSH_SECONDS

    def _write_epoch(self, history: Sequence[EpochNumbers]) -> None:
        """Writes the last epoch; the CSV is written anew, so that it holds each epoch once."""
        last = history[-1]
        for name, value in last.items():
            if name not in ("epoch", "step"):
                self._write_scalar(f"epoch/{name}", value, int(last["step"]))
        self._events.flush()
        self._write_csv(history)

    def _write_scalar(self, name: str, value: float, step: int) -> None:
        self._write(FileEvent(step=step, summary=scalar(name, value)))

    def _write(self, event: FileEvent) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)

    def _write_csv(self, history: Sequence[EpochNumbers]) -> None:
        if history:
            rows = [list(history[-1]), *(list(epoch.values()) for epoch in history)]
            write_atomically(self._csv, csv_bytes(rows))
