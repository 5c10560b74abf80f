"""Where caches lie, also for a user without a home."""

import os
import tempfile
from pathlib import Path

from fetal_flax.errors import InputError


def cache_folder(cache_dir: str) -> Path:
    """Returns the folder of the setting `data.cache_dir`, or one among the temporary files.

    The latter where the setting is in the user's home, and there is none or it can't be written, as
    in containers. It is this user's alone: what lies in it is trusted.

    Raises:
        InputError: There is no place for temporary files either.
    """
    if not cache_dir.startswith("~"):
        return Path(cache_dir)
    try:
        return writable_folder(cache_dir)
    except (OSError, RuntimeError):
        return _temporary_folder()


def writable_folder(path: str | Path) -> Path:
    """Returns a folder that files can be made in; makes it if needed.

    Args:
        path: The folder; `~` is the user's home.

    Raises:
        OSError: It can't be made, or nothing can be written to it.
        RuntimeError: There is no home: neither $HOME nor an entry in passwd tells it.
    """
    folder = Path(path).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):  # It may be there and not for this user.
        return folder


def check_temporary_files() -> None:
    """Refuses to go on where nothing can be written, as in a container that gives no folder for it.

    Raises:
        InputError: There is no place for temporary files.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        raise InputError(
            "no folder for temporary files can be written: give one as TMPDIR"
        ) from None


def _temporary_folder() -> Path:
    owner = os.getuid() if hasattr(os, "getuid") else ""
    try:
        folder = Path(tempfile.gettempdir(), f"fetal_flax-{owner}")
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
        if owner != "" and (facts.st_uid != owner or facts.st_mode & 0o077 or folder.is_symlink()):
            return Path(tempfile.mkdtemp(prefix="fetal_flax-"))  # Somebody else made it.
    except OSError as error:
        raise InputError(
            f"there is no home for caches, nor a place for temporary files ({error.strerror}): "
            "give a folder as --data.cache-dir, or as TMPDIR"
        ) from None
    return folder
