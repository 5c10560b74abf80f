"""Downloading a file once, checked by its SHA-256."""

import hashlib
import http.client
import os
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

import rich.console
import rich.progress

from fetal_flax.errors import InputError

_TIMEOUT_SECONDS = 60
_BLOCK_BYTES = 1 << 20


def fetch(url: str, destination: Path, *, sha256: str, size: int | None = None) -> Path:
    """Downloads `url` to `destination` unless the right file is there already.

    The file appears whole or not at all: it is written beside `destination` under another name,
    checked, and renamed.

    Args:
        url: Where the file is, by http or https.
        destination: Where it is to lie; directories are made.
        sha256: Its SHA-256, 64 hex digits.
        size: Its size in bytes, if known.

    Returns:
        `destination`.

    Raises:
        InputError: The download failed or is another file; the message says what to fetch by hand.
    """
    if destination.is_file() and _sha256(destination) == sha256:
        return destination
    by_hand = f"download it by hand to {destination}"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f"{destination.name}.", dir=destination.parent)
    except OSError as error:
        raise InputError(f"can't write {destination}: {error.strerror}") from None
    unfinished = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _download(url, file, label=destination.name, size=size)
        _check(unfinished, url, sha256, size)
        unfinished.chmod(0o644)  # mkstemp lets only the owner read.
        unfinished.replace(destination)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # It holds the connection.
        reason = getattr(error, "reason", None) or error
        raise InputError(f"can't download {url} ({reason}): {by_hand}") from None
    except InputError as error:
        raise InputError(f"{error}: {by_hand}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return destination


def _download(url: str, file: BinaryIO, *, label: str, size: int | None) -> None:
    """Copies what `url` answers into `file`, with a progress bar on stderr."""
    request = urllib.request.Request(url, headers={"User-Agent": "fetal_flax"})
    columns = (
        *rich.progress.Progress.get_default_columns(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
    )
    console = rich.console.Console(stderr=True)
    with (
        urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response,
        rich.progress.Progress(*columns, console=console) as progress,
    ):
        task = progress.add_task(label, total=size or response.length)
        while block := response.read(_BLOCK_BYTES):
            file.write(block)
            progress.advance(task, len(block))


def _check(path: Path, url: str, sha256: str, size: int | None) -> None:
    """Raises InputError if the file isn't the expected one."""
    found = path.stat().st_size
    if size is not None and found != size:
        raise InputError(f"{url} gave {found} bytes instead of {size}")
    digest = _sha256(path)
    if digest != sha256:
        raise InputError(f"{url} gave a file with SHA-256 {digest} instead of {sha256}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
