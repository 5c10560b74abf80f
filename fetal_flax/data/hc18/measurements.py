"""HC18's CSV: the pixel size of each image and, in the training set, the head's circumference."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from fetal_flax.errors import InputError, printable

CSV = "training_set_pixel_size_and_HC.csv"
COLUMNS = ("filename", "pixel size(mm)", "head circumference (mm)")
MOST_MM = 1000
"""No pixel and no head is that large."""
PROBLEMS_NAMED = 10
"""So many problems of a folder or a CSV are named in one error."""


def read_pixel_sizes(csv_path: Path) -> dict[str, float]:
    """Returns the pixel size in mm by file name, from a CSV as HC18 has them.

    Raises:
        InputError: The file can't be read, has other columns, a name twice, or a size that is no
            positive number.
    """
    rows, problems = read_rows(csv_path, COLUMNS[:2])
    sizes = {}
    for name, row in rows.items():
        try:
            sizes[name] = positive_mm(row, COLUMNS[1], csv_path.name)
        except InputError as error:
            problems.append(f"{printable(name)} {error}")
    if problems:
        raise InputError(f"{csv_path}: {'; '.join(problems[:PROBLEMS_NAMED])}")
    return sizes


def read_rows(
    path: Path, columns: Sequence[str] = COLUMNS
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Returns the CSV's rows by file name, and what is wrong with them."""
    try:
        if path.exists() and not path.is_file():  # A pipe would wait for ever.
            raise InputError(f"can't read {path}: give a regular file")
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{path} has no column {', '.join(map(repr, missing))}")
            rows, problems = {}, []
            for row in reader:
                name = row["filename"] or ""  # None where the row is too short.
                if name in rows:
                    problems.append(f"{printable(name)} has two rows in {path.name}")
                rows[name] = row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"can't read {path}: {error}") from None
    return rows, problems


def positive_mm(row: dict[str, str], column: str, csv_name: str = CSV) -> float:
    """Returns a column of a row of the CSV as a positive number of millimetres."""
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value < MOST_MM:
        raise InputError(
            f"has {printable(repr(row[column]))} as its {column} in {csv_name}, not a positive "
            f"number below {MOST_MM}"
        )
    return value
