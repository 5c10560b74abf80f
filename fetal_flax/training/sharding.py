"""Where arrays live: one mesh over all devices, the batch split over it, the rest on each."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fetal_flax.errors import InputError

BATCH_AXIS = "batch"


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
