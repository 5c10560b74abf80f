"""Worker processes of the data room: how many, and that none outlives its parent."""

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

import cv2

from fetal_flax.errors import InputError

MISSING_GUARD = (
    'a script that loads data in worker processes needs `if __name__ == "__main__":` around'
    " what it does"
)


def available_cpus() -> int:
    """Returns how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def can_start_workers() -> bool:
    """Returns whether processes can be spawned: they import the script, which stdin can't offer."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    return script is None or Path(script).exists()


def require_main_guard() -> None:
    """Stops a spawned process that runs the whole script again while it imports it.

    Raises:
        InputError: The script has no `if __name__ == "__main__":`.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise InputError(MISSING_GUARD)


def start_worker(*_: object) -> None:
    """Prepares a worker process: it ends with its parent and leaves the other CPUs alone.

    Without the first, the workers of a killed run would wait for it for ever. A terminal's Ctrl-C,
    which goes to all processes of a run, is for the parent to answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
