"""Training as several processes, on one host or many, on JAX's own distributed runtime.

Each process has devices of its own, reads its own rows of every batch and computes the same state.
The first process alone writes logs and pictures; all of them need the same workdir for checkpoints.
docs/scaling.md has launch lines.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
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
    gpus = local_gpus(os.environ)
    try:
        jax.distributed.initialize(coordinator, process_count, process_id, local_device_ids=gpus)
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


def local_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """Returns which of the GPUs that this process sees are its own.

    Under SLURM and Open MPI JAX would take one for each process, however few processes a host has.

    Args:
        environment: What the launcher has set, such as `os.environ`.

    Returns:
        Positions among the visible GPUs; an empty list for all of them; None leaves it to JAX.

    Raises:
        InputError: The host's processes can't share its GPUs evenly.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    if "SLURM_STEP_TASKS_PER_NODE" in environment:
        processes = _tasks_of_node(environment)
        position = int(environment["SLURM_LOCALID"])
    else:
        processes = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
        position = int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK", 0))
    if processes == 1:
        return []
    visible = _visible_gpus(environment)
    if visible == 0:
        return None
    # SLURM's --gpus-per-task shows each task its own alone; so does a script that sets
    # CUDA_VISIBLE_DEVICES for each process.
    if visible == 1 or visible < int(environment.get("SLURM_GPUS_ON_NODE", 0)):
        return []
    if visible % processes:
        raise InputError(
            f"--distributed has {processes} processes on this host, which can't share its "
            f"{visible} GPUs evenly: start 1 process on each host, or one for each GPU"
        )
    share = visible // processes
    return list(range(position * share, (position + 1) * share))


def _tasks_of_node(environment: Mapping[str, str]) -> int:
    """Returns how many of a SLURM step's tasks are on this node, from a text such as `8(x2),4`."""
    counts: list[int] = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        tasks, *times = re.findall(r"\d+", part)
        counts += [int(tasks)] * int(*times or [1])
    return counts[int(environment.get("SLURM_NODEID", 0))]


def _visible_gpus(environment: Mapping[str, str]) -> int:
    """Returns how many NVIDIA GPUs this process may see, without waking one."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len(chosen.split(",")) if chosen else 0
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


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
