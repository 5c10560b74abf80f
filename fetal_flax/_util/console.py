"""What commands show on a terminal: one progress bar, one kind of table, streams that bear it."""

import io
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import rich.box
import rich.console
import rich.progress
import rich.table

Item = TypeVar("Item")


class _UntilClosed(io.FileIO):
    """A stream that nobody may read any more: then what is written is lost, and nothing ends."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def harden_streams() -> None:
    """Makes stdout and stderr bear any text, a reader that leaves early, and being closed.

    `fetal-flax predict ... | head -1` would else lose its work at the second line, and a file's
    name in an alphabet that the terminal lacks at the first. Streams that somebody has put in their
    place already are left alone.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        if stream is None:  # Closed by whoever started this.
            raw = io.FileIO(os.open(os.devnull, os.O_WRONLY), "w")
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8"))
            continue
        stream.flush()
        raw = _UntilClosed(stream.fileno(), "wb", closefd=False)
        # Text is handed on at once: workers that are forked would write it a second time.
        hardened = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=True,
        )
        setattr(sys, name, hardened)


def track(items: Iterable[Item], what: str, count: int | None = None) -> Iterable[Item]:
    """Yields the items while a bar on stderr counts them.

    Args:
        items: What is worked on.
        what: Stands before the bar, such as "Evaluating".
        count: How many there are, where they don't tell.
    """
    console = rich.console.Console(stderr=True)
    return rich.progress.track(items, what, count, console=console)


def table(columns: Sequence[str], *, title: str | None = None) -> rich.table.Table:
    """Returns an empty table: the first column to the left, numbers to the right.

    In a narrow terminal digits go on below, where an ellipsis would swallow them.
    """
    made = rich.table.Table(
        title=title,
        title_justify="left",
        box=rich.box.SIMPLE,
        collapse_padding=True,
        pad_edge=False,
    )
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", overflow="fold")
    return made
