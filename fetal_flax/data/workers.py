"""Worker processes of the data room: how many, and that none outlives its parent."""

import multiprocessing
import os
import threading

import cv2


def available_cpus() -> int:
    """Returns how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start_worker(*_: object) -> None:
    """Prepares a worker process: it ends with its parent and leaves the other CPUs alone.

    Without the first, the workers of a killed run would wait for it for ever.
    """
    cv2.setNumThreads(1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
