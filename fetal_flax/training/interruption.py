"""SIGTERM and SIGINT, by which schedulers and people stop a run, as a request to save and go."""

import contextlib
import os
import signal
import types

import jax
from jax.experimental import multihost_utils

from fetal_flax._util.signals import handled
from fetal_flax.errors import Interrupted

_NOTHING_TO_SAVE = "stopped; there was nothing to save"


class Interruption:
    """Watches for signals while it is entered; a second one stops the process at once.

    Until `defer` is called there is nothing to save, and the first raises Interrupted at once.

    With several processes, all agree on the moment to stop: JAX's own handler of SIGTERM tells the
    others, and SIGINT is handed on to it. There, a second signal counts once all have stopped.
    """

    def __init__(self) -> None:
        self._distributed = jax.process_count() > 1
        self._watched = (signal.SIGINT,) if self._distributed else (signal.SIGINT, signal.SIGTERM)
        self._handlers = contextlib.ExitStack()
        self._deferred = False
        self._requested = False
        self._asked = 0

    def __enter__(self) -> "Interruption":
        self._handlers.enter_context(handled(self._watched, self._receive))
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.close()

    def defer(self) -> None:
        """Lets a signal wait until `requested` is asked."""
        self._deferred = True

    def raise_at_once(self) -> None:
        """Ends `defer`: nothing is left to save.

        Raises:
            Interrupted: A signal has waited.
        """
        self._deferred = False
        if self._requested:
            raise Interrupted(_NOTHING_TO_SAVE)

    @property
    def noticed(self) -> bool:
        """Whether `requested` has returned True, or will at once."""
        return self._requested

    def requested(self) -> bool:
        """Returns whether to save and stop now; all processes ask equally often."""
        if self._distributed and not self._requested:
            self._asked += 1
            self._requested = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._requested

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        del number, frame
        for watched in self._watched:
            signal.signal(watched, signal.SIG_DFL)
        if self._distributed:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self._requested = True
        if not self._deferred:
            raise Interrupted(_NOTHING_TO_SAVE)
