"""What a run tells while it runs: bars on a terminal, a line per epoch elsewhere, and logs."""

import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import rich.console
import rich.progress

from fetal_flax.files import csv_bytes, write_atomically

# When imported, tensorboardX loads PyTorch where that is installed: two seconds for a type's name.
if "torch" in sys.modules:
    import tensorboardX
else:
    sys.modules["torch"] = None  # pyright: ignore
    import tensorboardX

    del sys.modules["torch"]

Epoch = Mapping[str, float]
"""One epoch's numbers by name: `epoch`, `step`, losses, Dices, rates and times."""


TRACED_CALLS = range(2, 5)
"""Calls of the step that a profile shows; the first compiles."""


class Progress:
    """Progress bars with loss, Dice, images per second and the share spent waiting for input.

    Args:
        epochs: Epochs of the whole run.
    """

    def __init__(self, epochs: int):
        self.console = rich.console.Console()
        self._epochs = epochs

    def say(self, text: str) -> None:
        """Prints a line."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, epoch: int, steps: int) -> Iterator["Bar"]:
        """Shows a bar for one epoch's training steps; gone when they are done."""
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
            yield Bar(progress, progress.add_task("", total=steps, numbers=""))

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
        """Counts steps that were dispatched."""
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
    """

    def __init__(self, workdir: Path, next_step: int):
        self._csv = workdir / "metrics.csv"
        self._writer = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=next_step
        )

    def step(self, step: int, loss: float, dice: float) -> None:
        """Logs one training step."""
        self._writer.add_scalar("step/train_loss", loss, step)
        self._writer.add_scalar("step/train_dice", dice, step)

    def epoch(self, history: list[dict[str, float]]) -> None:
        """Logs the last epoch; the CSV is written anew, so that it holds each epoch once."""
        last = history[-1]
        for name, value in last.items():
            if name not in ("epoch", "step"):
                self._writer.add_scalar(f"epoch/{name}", value, int(last["step"]))
        self._writer.flush()
        rows = [list(last), *(list(epoch.values()) for epoch in history)]
        write_atomically(self._csv, csv_bytes(rows))

    def close(self) -> None:
        """Flushes and closes the files."""
        self._writer.close()
