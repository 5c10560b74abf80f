"""What commands show on a terminal: one progress bar and one kind of table."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import rich.box
import rich.console
import rich.progress
import rich.table

Item = TypeVar("Item")


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
