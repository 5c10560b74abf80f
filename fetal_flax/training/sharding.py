"""Where arrays live: one mesh over all devices, the batch split over it, the rest on each."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fetal_flax.config import ModelConfig
from fetal_flax.errors import InputError

BATCH_AXIS = "batch"


def check_devices(model: ModelConfig) -> None:
    """Refuses to compute on a CPU where a GPU was to be expected, or what no CPU is fast at.

    Before anything else asks JAX for its devices.

    Raises:
        InputError: A GPU's plugin is installed and no GPU answers, unless `JAX_PLATFORMS` names the
            CPU; or the network is to compute in bfloat16 on a CPU.
    """
    asked_for = jax.config.values["jax_platforms"] or ""
    try:
        on_cpu = jax.default_backend() == "cpu"
    except (AssertionError, RuntimeError):  # The first where JAX knows no such platform.
        raise InputError(
            f"JAX finds no device to compute on (JAX_PLATFORMS is {asked_for or 'not set'}): see "
            "to the driver (nvidia-smi), or set JAX_PLATFORMS=cpu to compute on the CPU"
        ) from None
    if not on_cpu:
        return
    plugins = [each.name for each in importlib.metadata.entry_points(group="jax_plugins")]
    if plugins and "cpu" not in asked_for.split(","):
        raise InputError(
            f"JAX's plugin {plugins[0]} is installed, but no device of its answers: see to the "
            "driver (nvidia-smi) and to CUDA_VISIBLE_DEVICES, or set JAX_PLATFORMS=cpu to compute "
            "on the CPU"
        )
    if model.dtype == "bfloat16":
        raise InputError(
            "setting model.dtype is bfloat16, which takes XLA more than a quarter of an hour to "
            "compile for a CPU: use float32 here, and bfloat16 on a GPU"
        )


def create_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a one-dimensional mesh over `devices`, or over all there are."""
    # In the processes' order, so that each one's rows of a batch are neighbours.
    ordered = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(devices or ordered), (BATCH_AXIS,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits an array's first axis over the mesh."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXIS))


def step_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits an array's second axis, behind that of the steps."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns arrays that are whole on every device, and may share the given ones' memory.

    With several processes, each must have the same values.
    """
    sharding = replicated(mesh)
    if jax.process_count() > 1:
        return jax.tree.map(
            lambda a: jax.make_array_from_process_local_data(sharding, np.array(a)), tree
        )
    return jax.device_put(tree, sharding)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Refuses a batch that can't be split evenly.

    Raises:
        InputError: The device count doesn't divide the batch size.
    """
    if batch_size % mesh.size:
        raise InputError(
            f"setting schedule.batch_size is {batch_size}, which {mesh.size} devices can't share "
            f"evenly: use a multiple of {mesh.size}"
        )
