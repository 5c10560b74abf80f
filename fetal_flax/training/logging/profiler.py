"""A trace of a few calls of a run, for TensorBoard or Perfetto."""

import contextlib
from pathlib import Path

import jax

from fetal_flax.training.events import CallBegan, CallDispatched, Event

TRACED_CALLS = range(2, 5)
"""Calls that a profile shows; the first compiles."""


class Profiler:
    """Traces the calls `TRACED_CALLS` of a run.

    Args:
        folder: Where the trace goes.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._call = -1
        self._trace = contextlib.ExitStack()

    def __call__(self, event: Event) -> None:
        """Listens to a run."""
        if isinstance(event, CallBegan):
            self._call += 1
            if self._call == TRACED_CALLS.start:
                jax.block_until_ready(event.arguments)
                options = jax.profiler.ProfileOptions()
                # Python's frames tell little of a step, and following every loader thread is risky.
                options.python_tracer_level = 0
                trace = jax.profiler.trace(self._folder, profiler_options=options)
                self._trace.enter_context(trace)
        elif isinstance(event, CallDispatched) and self._call == TRACED_CALLS.stop - 1:
            jax.block_until_ready(event.results)
            self._trace.close()

    def close(self) -> None:
        """Ends the trace of a run with fewer calls."""
        self._trace.close()
