"""What a run tells while it runs: bars on a terminal, a line per epoch elsewhere, and logs."""

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.console
import rich.progress
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.summary import scalar

from fetal_flax.files import csv_bytes, write_atomically

Epoch = Mapping[str, float]
"""One epoch's numbers by name: `epoch`, `step`, losses, Dices, rates and times."""


TRACED_CALLS = range(2, 5)
"""Calls of the step that a profile shows; the first compiles."""


FLUSH_SECONDS = 30
"""How old what TensorBoard sees may be."""


class Progress:
    """Progress bars with loss, Dice, images per second and the share spent waiting for input.

    Args:
        epochs: Epochs of the whole run.
        quiet: Print nothing, as of several processes all but the first do.
    """

    def __init__(self, epochs: int, *, quiet: bool = False):
        self.console = rich.console.Console(quiet=quiet)
        self._epochs = epochs

    def say(self, text: str) -> None:
        """Prints a line."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, epoch: int, steps: int, done: int = 0) -> Iterator["Bar"]:
        """Shows a bar for one epoch's training steps, `done` of them before; gone at the end."""
        columns = (
            rich.progress.TextColumn(f"epoch {epoch}/{self._epochs}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[numbers]}"),
            rich.progress.TimeRemainingColumn(),
        )
        # A log file gets the line at the epoch's end and no bars.
        with rich.progress.Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as progress:
            yield Bar(progress, progress.add_task("", total=steps, completed=done, numbers=""))

    def epoch(self, numbers: Epoch, *, is_best: bool) -> None:
        """Prints an epoch's line."""
        self.say(
            f"epoch {numbers['epoch']:3.0f}/{self._epochs}  "
            f"train loss {numbers['train_loss']:.4f} Dice {numbers['train_dice']:.4f}  "
            f"validation loss {numbers['validation_loss']:.4f} "
            f"Dice {numbers['validation_dice']:.4f}{' *' if is_best else '  '}  "
            f"lr {numbers['learning_rate']:.2g}  {numbers['images_per_second']:.1f} images/s  "
            f"waiting {numbers['waiting']:.0%}  {numbers['seconds']:.0f} s"
        )


class Bar:
    """One epoch's bar.

    Args:
        progress: The bars on the terminal.
        task: Which of them this is.
    """

    def __init__(self, progress: rich.progress.Progress, task: rich.progress.TaskID):
        self._progress = progress
        self._task = task

    def advance(self, steps: int) -> None:
        """Counts steps that are done."""
        self._progress.advance(self._task, steps)

    def show(self, *, loss: float, dice: float, images_per_second: float, waiting: float) -> None:
        """Shows the numbers of a step that is done."""
        numbers = (
            f"loss {loss:.4f}  Dice {dice:.4f}  {images_per_second:.1f} images/s  "
            f"waiting {waiting:.0%}"
        )
        self._progress.update(self._task, numbers=numbers)


@contextlib.contextmanager
def traced(step: Any, folder: Path | None) -> Iterator[Any]:
    """Yields a step whose calls `TRACED_CALLS` are traced, for TensorBoard or Perfetto.

    Args:
        step: Any function that dispatches to the devices.
        folder: Where the trace goes; None yields the step as it is.
    """
    if folder is None:
        yield step
        return
    calls = itertools.count()

    def traced_step(*arguments: Any) -> Any:
        call = next(calls)
        if call == TRACED_CALLS.start:
            jax.block_until_ready(arguments)
            options = jax.profiler.ProfileOptions()
            # Python's frames tell little of a step, and following every loader thread is risky.
            options.python_tracer_level = 0
            trace.enter_context(jax.profiler.trace(folder, profiler_options=options))
        results = step(*arguments)
        if call == TRACED_CALLS.stop - 1:
            jax.block_until_ready(results)
            trace.close()
        return results

    # Ends the trace of a run with fewer calls, too.
    with contextlib.ExitStack() as trace:
        yield traced_step


class Logs:
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

    def __init__(self, workdir: Path, next_step: int, history: Sequence[Epoch]):
        self._csv = workdir / "metrics.csv"
        self._flush_at = 0.0
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # Not through SummaryWriter: where its thread can't write, the run would wait for ever.
        self._events = EventsWriter(str(folder / "events"))
        self._write(Event(step=next_step, session_log=SessionLog(status=SessionLog.START)))
        self._write_csv(history)

    def step(self, step: int, loss: float, dice: float) -> None:
        """Logs one training step."""
        self._scalar("step/train_loss", loss, step)
        self._scalar("step/train_dice", dice, step)
        if time.monotonic() > self._flush_at:
            self._events.flush()
            self._flush_at = time.monotonic() + FLUSH_SECONDS

    def epoch(self, history: Sequence[Epoch]) -> None:
        """Logs the last epoch; the CSV is written anew, so that it holds each epoch once."""
        last = history[-1]
        for name, value in last.items():
            if name not in ("epoch", "step"):
                self._scalar(f"epoch/{name}", value, int(last["step"]))
        self._events.flush()
        self._write_csv(history)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._events.close()

    def _scalar(self, name: str, value: float, step: int) -> None:
        self._write(Event(step=step, summary=scalar(name, value)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)

    def _write_csv(self, history: Sequence[Epoch]) -> None:
        if history:
            rows = [list(history[-1]), *(list(epoch.values()) for epoch in history)]
            write_atomically(self._csv, csv_bytes(rows))
