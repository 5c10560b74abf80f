"""Small files, written so that no reader sees half of one."""

import contextlib
import csv
import errno
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fetal_flax.errors import InputError


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file whole or not at all; creates its folder if needed.

    Raises:
        InputError: The file can't be written; whatever was at `path` is still there.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a path to write to, and moves the file to `path` at the end, unless an error ends it.

    Raises:
        InputError: The file can't be written; whatever was at `path` is still there.
    """
    path = Path(path)
    # In the same folder, since a move between file systems is a copy; the process id keeps
    # two runs apart.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "make room" if full else "choose an output folder that can be written"
        raise InputError(f"can't write {path} ({error.strerror}): {way_out}") from error


def csv_bytes(rows: Sequence[Sequence[object]]) -> bytes:
    """Returns rows as CSV, numbers with all their digits."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """Returns values as indented JSON; numbers that are not finite are a ValueError."""
    return (json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()
