"""Training as several processes, on one host or many, on JAX's own distributed runtime.

Each process has devices of its own, reads its own rows of every batch and computes the same state.
The first process alone writes logs and pictures; all of them need the same workdir for checkpoints.
docs/scaling.md has launch lines.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from fetal_flax.errors import InputError

Result = TypeVar("Result")

_MESSAGE_BYTES = 2048


def initialize(
    coordinator: str | None = None, process_count: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes; before JAX is asked for its devices.

    Args:
        coordinator: HOST:PORT of the first process; None where SLURM, Open MPI or Kubernetes tell.
        process_count: Number of processes, likewise.
        process_id: This one's position, from 0, likewise.

    Raises:
        InputError: Neither the arguments nor the environment tell, or the others don't answer.
    """
    try:
        jax.distributed.initialize(coordinator, process_count, process_id)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--distributed found no other processes ({str(error).splitlines()[0]}): start under "
            "SLURM or Open MPI, or give --coordinator HOST:PORT, --process-count and --process-id"
        ) from None
    if jax.device_count() != jax.local_device_count() * jax.process_count():
        raise InputError(
            f"process {jax.process_index()} has {jax.local_device_count()} of "
            f"{jax.device_count()} devices: give each of {jax.process_count()} processes as many"
        )


def is_first() -> bool:
    """Returns whether this process is the one that writes."""
    return jax.process_index() == 0


def shard() -> tuple[int, int]:
    """Returns this process's position among the processes, and their number."""
    return jax.process_index(), jax.process_count()


def run_on_all_processes(function: Callable[[], Result]) -> Result:
    """Calls a function in every process, and lets none go on alone.

    Raises:
        InputError: It was raised in one of them; it is raised in all.
    """
    if jax.process_count() == 1:
        return function()
    message, result = "", None
    try:
        result = function()
    except InputError as error:
        message = str(error)
    padded = np.zeros(_MESSAGE_BYTES, np.uint8)
    encoded = np.frombuffer(message.encode()[:_MESSAGE_BYTES], np.uint8)
    padded[: len(encoded)] = encoded
    for text in multihost_utils.process_allgather(padded):
        if text.any():
            raise InputError(bytes(text[text > 0]).decode(errors="ignore"))
    return result  # type: ignore[return-value]
