"""HC18's CSV: the pixel size of each image and, in the training set, the head's circumference."""

import csv
import io
import math
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from fetal_flax.errors import InputError, file_name, printable

CSV = "training_set_pixel_size_and_HC.csv"
COLUMNS = ("filename", "pixel size(mm)", "head circumference (mm)")
MOST_MM = 1000
"""No pixel and no head is that large."""
PROBLEMS_NAMED = 10
"""So many problems of a folder or a CSV are named in one error."""

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_BLANKS = " \t\0\ufeff\xa0"
# A decimal comma is none of thousands: no pixel and no head is that large.
_NUMBER = re.compile(
    r"([-+]?(?:\d+(?:[.,]\d*)?|[.,]\d+)(?:e[-+]?\d+)?) ?(?:mm)?", re.ASCII | re.IGNORECASE
)

Rows = dict[str, dict[str, str]]


def read_pixel_sizes(csv_path: Path, names: Collection[str] | None = None) -> dict[str, float]:
    """Returns the pixel size in mm by file name, from a CSV as HC18 has them, or Excel makes them.

    Args:
        csv_path: The CSV.
        names: The files whose sizes are wanted; what is wrong with other rows doesn't matter.
            Without them, all rows are wanted.

    Raises:
        InputError: The file can't be read, has other columns, or, of a wanted file, two rows that
            differ or a size that is no positive number.
    """
    rows, problems = read_rows(csv_path, COLUMNS[:2])
    wanted = dict(rows) if names is None else find_rows(rows, names)
    faults = [problem for name, problem in problems if names is None or name in wanted]
    sizes: dict[str, float] = {}
    for name, row in wanted.items():
        try:
            sizes[name] = positive_mm(row, COLUMNS[1], csv_path.name)
        except InputError as error:
            faults.append(f"{printable(name)} {error}")
    if faults:
        raise InputError(f"{csv_path}: {'; '.join(faults[:PROBLEMS_NAMED])}")
    return sizes


def find_rows(rows: Mapping[str, dict[str, str]], names: Collection[str]) -> Rows:
    """Returns the rows of these files, by file.

    A row's name that is no file's may be one in another case, composition (macOS has its own) or
    with a folder before it, where just one row and one file are alike so.
    """
    found = {name: rows[file_name(name)] for name in names if file_name(name) in rows}
    files, others = (_by_likeness(those) for those in (names, rows.keys()))
    for likeness, alike in files.items():
        if len(alike) == len(others.get(likeness, ())) == 1 and alike[0] not in found:
            found[alike[0]] = rows[others[likeness][0]]
    return found


def _by_likeness(names: Collection[str]) -> dict[str, list[str]]:
    alike: dict[str, list[str]] = {}
    for name in names:
        last = re.split(r"[/\\]", file_name(name))[-1]
        alike.setdefault(unicodedata.normalize("NFC", last).casefold(), []).append(name)
    return alike


def read_rows(path: Path, columns: Sequence[str] = COLUMNS) -> tuple[Rows, list[tuple[str, str]]]:
    """Returns the CSV's rows by file name, and what is wrong with them.

    Separators are commas, semicolons, tabs or bars; the text is UTF-8, UTF-16 with its mark, or
    else Windows-1252; lines before the header may begin with `#` or be Excel's `sep=;`. Columns may
    be written in another case, with other spaces and brackets. Empty rows are none.

    Args:
        path: The CSV.
        columns: Those to read.

    Returns:
        The cells of `columns` by file name, and pairs of a file's name and a sentence.

    Raises:
        InputError: The file can't be read, or lacks a column; the message has those it has.
    """
    try:
        if path.exists() and not path.is_file():  # A pipe would wait for ever.
            raise InputError(f"can't read {path}: give a regular file")
        text = _decoded(path.read_bytes())
        places, width, table = _table(path, text, columns)
        rows: Rows = {}
        problems: list[tuple[str, str]] = []
        for cells in table:
            cells = [cell.strip(_BLANKS) for cell in cells]
            row = {c: cells[at] if at < len(cells) else "" for c, at in places.items()}
            name = row[columns[0]]
            if not name:  # As Excel leaves them behind.
                continue
            if rows.get(name, row) != row:
                problems.append((name, f"{printable(name)} has two rows in {path.name}"))
            if any(cells[width:]):  # Such as a decimal comma between commas.
                problems.append(
                    (name, f"{printable(name)} has more cells than the header in {path.name}")
                )
            rows[name] = row
    except OSError as error:
        raise InputError(f"can't read {path} ({error.strerror}): give a CSV file") from None
    except csv.Error as error:
        raise InputError(f"can't read {path}: {printable(str(error))}") from None
    return rows, problems


def _decoded(data: bytes) -> str:
    if data[:4] in (b"PK\3\4", b"\xd0\xcf\x11\xe0"):  # Of today, and before 2007.
        raise csv.Error("it is an Excel workbook; save it as CSV")
    for encoding in ("utf-16", "utf-8-sig", "cp1252"):
        if encoding == "utf-16" and data[:2] not in (b"\xff\xfe", b"\xfe\xff"):
            continue
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            pass
    return data.decode("latin-1")


def _table(
    path: Path, text: str, columns: Sequence[str]
) -> tuple[dict[str, int], int, list[list[str]]]:
    """Returns where the columns are, how many the header has, and the rows below it."""
    stream, separators = io.StringIO(text, newline=""), list(_SEPARATORS)
    start, line = 0, stream.readline()
    while line and (line.strip(_BLANKS + '\r\n,;|"') == "" or line.startswith(("#", "sep="))):
        if line.startswith("sep=") and line[4:5].strip("\r\n"):
            separators = [line[4]]
        start, line = stream.tell(), stream.readline()
    found: list[tuple[str, list[list[str]]]] = []
    failure: csv.Error | None = None
    for separator in separators:
        stream.seek(start)
        try:
            table = list(csv.reader(stream, delimiter=separator)) or [[]]
        except csv.Error as error:
            failure = error
            continue
        places = _places([cell.strip(_BLANKS) for cell in table[0]], columns)
        if len(places) == len(columns):
            return places, len(table[0]), table[1:]
        found.append((separator, table))
    if not found and failure is not None:
        raise failure
    separator, table = max(found, key=lambda pair: len(pair[1][0]))
    places = _places(table[0], columns)
    lacking = ", ".join(repr(name) for name in columns if name not in places)
    header = ", ".join(printable(repr(cell)) for cell in table[0][:10]) or "nothing"
    words = _SEPARATORS.get(separator, repr(separator))
    raise InputError(
        f"{path} has no column {lacking}: its first row, read with {words} between the columns, is "
        f"{header}"
    )


def _places(header: Sequence[str], columns: Sequence[str]) -> dict[str, int]:
    """Returns the place of each column that is there once, under its own name or one like it."""

    def plain(name: str) -> str:
        return re.sub(r"[\s()\[\]_.-]", "", name).casefold()

    places: dict[str, int] = {}
    for column in columns:
        for names, name in ((list(header), column), ([*map(plain, header)], plain(column))):
            if names.count(name) == 1:
                places[column] = names.index(name)
                break
    return places


def positive_mm(row: Mapping[str, str], column: str, csv_name: str = CSV) -> float:
    """Returns a column of a row of the CSV as a positive number of millimetres."""
    number = _NUMBER.fullmatch(row[column])
    value = float(number[1].replace(",", ".")) if number else math.nan
    if not 0 < value < MOST_MM:
        raise InputError(
            f"has {printable(repr(row[column]))} as its {column} in {csv_name}, not a positive "
            f"number below {MOST_MM}"
        )
    return value
