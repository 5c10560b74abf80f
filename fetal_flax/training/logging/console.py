"""What a run tells on the terminal: a bar per epoch, or a line where there is no terminal."""

import contextlib

import rich.console
import rich.progress

from fetal_flax.training.events import (
    EpochBegan,
    EpochDone,
    EpochNumbers,
    Event,
    Message,
    StepDone,
    ValidationBegan,
)


class Console:
    """Bars with loss, Dice, images per second and the share spent waiting for input; a line each.

    Args:
        epochs: Epochs of the whole run.
        quiet: Print nothing, as of several processes all but the first do.
    """

    def __init__(self, epochs: int, *, quiet: bool = False):
        self._console = rich.console.Console(quiet=quiet)
        self._epochs = epochs
        self._bar = contextlib.ExitStack()
        self._progress: rich.progress.Progress | None = None

    def __call__(self, event: Event) -> None:
        """Listens to a run."""
        match event:
            case Message():
                self._print(event.text)
            case EpochBegan():
                self._open_bar(event)
            case StepDone(applied=False):
                self._advance("")
                self._print(f"step {event.step} skipped: its loss or gradients are not finite")
            case StepDone():
                self._advance(
                    f"loss {event.loss:.4f}  Dice {event.dice:.4f}  "
                    f"{event.images_per_second:.1f} images/s  waiting {event.waiting:.0%}"
                )
            case ValidationBegan():
                self.close()
            case EpochDone():
                self._print(self._epoch_line(event.history[-1], is_best=event.is_best))

    def close(self) -> None:
        """Takes the bar away, where there is one."""
        self._bar.close()
        self._progress = None

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def _open_bar(self, event: EpochBegan) -> None:
        self.close()
        columns = (
            rich.progress.TextColumn(f"epoch {event.epoch}/{self._epochs}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[numbers]}"),
            rich.progress.TimeRemainingColumn(),
        )
        # A log file gets the line at the epoch's end and no bars.
        disabled = not self._console.is_terminal
        self._progress = self._bar.enter_context(
            rich.progress.Progress(
                *columns, console=self._console, transient=True, disable=disabled
            )
        )
        self._progress.add_task("", total=event.steps, completed=event.steps_done, numbers="")

    def _advance(self, numbers: str) -> None:
        if self._progress is not None:
            [task] = self._progress.task_ids
            self._progress.advance(task)
            if numbers:
                self._progress.update(task, numbers=numbers)

    def _epoch_line(self, numbers: EpochNumbers, *, is_best: bool) -> str:
        return (
            f"epoch {numbers['epoch']:3.0f}/{self._epochs}  "
            f"train loss {numbers['train_loss']:.4f} Dice {numbers['train_dice']:.4f}  "
            f"validation loss {numbers['validation_loss']:.4f} "
            f"Dice {numbers['validation_dice']:.4f}{' *' if is_best else '  '}  "
            f"lr {numbers['learning_rate']:.2g}  {numbers['images_per_second']:.1f} images/s  "
            f"waiting {numbers['waiting']:.0%}  {numbers['seconds']:.0f} s"
        )
