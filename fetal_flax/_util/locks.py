"""A lock between processes, which says who holds it."""

import contextlib
import os
import platform
from collections.abc import Generator
from pathlib import Path

import filelock

from fetal_flax.errors import InputError


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Generator[None, None, None]:
    """Holds a lock file against other processes; a killed one lets go.

    Args:
        path: The lock file; it and its folder are made if needed, and stay.
        wait: Wait for another holder, instead of raising.

    Raises:
        InputError: Another process holds it.
        OSError: The file can't be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if not filelock.lock_descriptor(file.fileno(), blocking=wait):
            file.seek(1)
            holder = file.read().decode(errors="replace").strip()
            raise InputError(
                f"{path.parent} is in use by {holder or 'another process'}: wait for it, or choose "
                "another folder"
            )
        file.truncate(0)
        # The first byte says nothing: on Windows nobody else can read it while the lock is held.
        file.write(f" process {os.getpid()} on {platform.node()}\n".encode())
        file.flush()
        yield
