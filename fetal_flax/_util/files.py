"""Small files: writing them so that no reader sees half of one, and locks."""

import contextlib
import csv
import errno
import fcntl
import io
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fetal_flax.errors import InputError


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file whole or not at all; creates its folder if needed.

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
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "make room" if full else "choose an output folder that can be written"
        raise InputError(f"can't write {path} ({error.strerror}): {way_out}") from error


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Holds a lock file against other processes; a killed one lets go.

    Args:
        path: The lock file; it and its folder are made if needed, and stay.
        wait: Wait for another holder, instead of raising.

    Raises:
        InputError: Another process holds it.
        OSError: The file can't be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"{path.parent} is in use by {file.read().strip() or 'another process'}: wait for "
                "it, or choose another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def csv_bytes(rows: Sequence[Sequence[object]]) -> bytes:
    """Returns rows as CSV, numbers with all their digits."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """Returns values as indented JSON; numbers that are not finite are a ValueError."""
    return (json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()
