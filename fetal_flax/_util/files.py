"""Small files, written so that no reader sees half of one."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fetal_flax.errors import InputError

_TEMPORARY = ".{digest}.{process}.tmp"


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file whole or not at all; creates its folder if needed.

    Raises:
        InputError: The file can't be written; whatever was at `path` is still there.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: str | Path) -> Generator[Path, None, None]:
    """Gives a path to write to, and moves the file to `path` at the end, unless an error ends it.

    Raises:
        InputError: The file can't be written, or `path` is no regular file; whatever was there
            still is.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise InputError(f"can't write {path}, which is a folder or device: name a file")
    # In the same folder, since a move between file systems is a copy; the process id keeps two runs
    # apart, and a digest is shorter than any name that the system takes.
    name = _TEMPORARY.format(digest=_digest(path.name), process=os.getpid())
    temporary = path.with_name(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _not_written(path, error) from error


def remove_temporaries(folder: Path, *names: str) -> None:
    """Removes what killed processes have left of files that `replacing` was writing.

    Args:
        folder: Where the files were to be; it may be missing.
        names: The files, where others write to the folder too; without any, all in it.

    Raises:
        InputError: Something can't be removed.
    """
    try:
        for digest in map(_digest, names) if names else ["[0-9a-f]" * 16]:
            for path in folder.glob(_TEMPORARY.format(digest=digest, process="[0-9]*")):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise _not_written(folder, error) from error


def _digest(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


class GrowingFile:
    """A file that is whole after every addition, whatever ends the process.

    It appears with the first addition; what was at its place before is removed at once, so that
    it never passes for new, but for what is to be kept of it. `close` it, or use it as a context
    manager.

    Args:
        path: The file; its folder is made if needed.
        head: Its first bytes.
        tail: Its last bytes, always behind what was added.
        separator: Stands between two additions.
        kept: Additions of before, with which it begins.

    Raises:
        InputError: What was there before can't be removed or replaced.
    """

    def __init__(
        self,
        path: Path,
        head: bytes,
        *,
        tail: bytes = b"",
        separator: bytes = b"",
        kept: Sequence[bytes] = (),
    ):
        self._path, self._head, self._tail, self._separator = path, head, tail, separator
        self._descriptor: int | None = None
        self._end = 0
        try:
            if kept:
                content = head + separator.join(kept)
                write_atomically(path, content + tail)
                self._descriptor = os.open(path, os.O_WRONLY)
                self._end = len(content)
                return
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            pass
        except OSError as error:
            raise _not_written(path, error) from error

    def add(self, content: bytes) -> None:
        """Adds bytes behind those before.

        Raises:
            InputError: They can't be written; the file is as it was.
        """
        first = self._descriptor is None
        try:
            if self._descriptor is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            begin = self._head if first else self._separator
            self._write(begin + content + self._tail)
            self._end += len(begin + content)
        except OSError as error:
            raise _not_written(self._path, error) from error

    def _write(self, content: bytes) -> None:
        """Writes at the end, before the tail; a part of it is taken back."""
        assert self._descriptor is not None
        try:
            os.lseek(self._descriptor, self._end, os.SEEK_SET)
            if os.write(self._descriptor, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._descriptor, self._end)
            if self._end and self._tail:  # There was room for it before.
                os.lseek(self._descriptor, self._end, os.SEEK_SET)
                os.write(self._descriptor, self._tail)
            elif not self._end:
                self._path.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """Closes the file, if anything was added."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "GrowingFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()


def growing_csv(
    path: Path, columns: Sequence[str], kept: Sequence[Sequence[object]] = ()
) -> GrowingFile:
    """Returns a CSV to which `csv_bytes([row])` is added behind the rows `kept`."""
    return GrowingFile(path, csv_bytes([columns]), kept=[csv_bytes([row]) for row in kept])


def whole_rows(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """Returns the rows that `growing_csv` has written whole; none where it wrote no such file."""
    content, head = _content(path), csv_bytes([columns])
    rows: list[list[str]] = []
    if not content.startswith(head):
        return rows
    end = len(head)
    text = io.StringIO(content[end:].decode(errors="replace"), newline="")
    with contextlib.suppress(csv.Error):  # Of what is no text.
        for row in csv.reader(text):
            line = csv_bytes([row])
            # Half a row reads as one too, but isn't written like that.
            if len(row) != len(columns) or not content.startswith(line, end):
                break
            rows.append(row)
            end += len(line)
    return rows


def growing_json(path: Path, kept: Sequence[bytes] = ()) -> GrowingFile:
    """Returns a JSON list to which texts of objects, a line each, are added behind `kept`."""
    return GrowingFile(path, b"[\n", tail=b"\n]\n", separator=b",\n", kept=kept)


def whole_objects(path: Path) -> list[bytes]:
    """Returns the texts that `growing_json` has written whole; none where it wrote no such file."""
    texts: list[bytes] = []
    for line in _content(path).split(b"\n")[1:]:
        text = line.removesuffix(b",")
        try:
            if not isinstance(json.loads(text), dict):
                break
        except ValueError:
            break
        texts.append(text)
    return texts


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _not_written(path: Path, error: OSError) -> InputError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    way_out = "make room" if full else "choose an output folder that can be written"
    return InputError(f"can't write {path} ({error.strerror}): {way_out}")


def csv_bytes(rows: Sequence[Sequence[object]]) -> bytes:
    """Returns rows as CSV, numbers with all their digits."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """Returns values as indented JSON; numbers that are not finite are a ValueError."""
    return (json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()
