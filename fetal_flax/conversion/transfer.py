"""Strict transfer between PyTorch state dicts and a network's variables, in both directions."""

from collections.abc import Mapping

import jax
import numpy as np

from fetal_flax.conversion.names import IGNORED, Table, Tensors, find, find_inverse
from fetal_flax.errors import InputError, printable
from fetal_flax.models.functional import Variables


def from_state_dict(
    tensors: Mapping[str, np.ndarray],
    table: Table,
    expected: Variables,
    *,
    source: str,
    network: str,
) -> Variables:
    """Returns the variables that a state dict holds, as float32 arrays in our names and layout.

    Args:
        tensors: PyTorch names and arrays.
        table: Which name goes where.
        expected: Shapes of the variables to fill, all of them.
        source: How errors name the file.
        network: How errors name what it should hold.

    Raises:
        InputError: Names are missing or surplus, shapes differ, or values are not finite floats;
            all of it is listed at once, in PyTorch's names.
    """
    shapes = {name: array.shape for arrays in expected for name, array in arrays.items()}
    found, surplus, wrong = {}, [], []
    for torch_name, tensor in tensors.items():
        if IGNORED.fullmatch(torch_name):
            continue
        target = find(torch_name, table)
        if target is None or target[0] not in shapes:
            surplus.append(f"surplus {printable(torch_name)} with shape {tensor.shape}")
            continue
        name, layout = target
        if name in found:
            surplus.append(f"{torch_name} is a second {name}")
            continue
        found[name] = array = layout.to_ours(tensor)
        if array is None or array.shape != shapes[name]:
            right = layout.to_torch(np.broadcast_to(0, shapes[name])).shape
            wrong.append(f"{torch_name} has shape {tensor.shape}, not {right}")
        elif not is_float(array):
            wrong.append(f"{torch_name} holds {array.dtype}, not floats")
        elif not np.isfinite(as_float32(array)).all():
            wrong.append(f"{torch_name} holds values that are not finite in float32")
    missing = [_torch_name(name, table) for name in shapes if name not in found]
    problems = [f"missing {name}" for name in sorted(missing)] + sorted(surplus) + sorted(wrong)
    if problems:
        raise InputError(
            f"{source} doesn't fit {network}: {'; '.join(problems)}: give a state dict of exactly "
            "this network"
        )
    # jnp.asarray would compile a program for each shape.
    return Variables(
        *({n: jax.device_put(as_float32(found[n])) for n in arrays} for arrays in expected)
    )


def to_state_dict(variables: Variables, table: Table) -> Tensors:
    """Returns variables under PyTorch's names and in its layout: the inverse of `from_state_dict`.

    Batch norms' `num_batches_tracked`, which nothing reads, is not there: PyTorch's
    `load_state_dict` fills it in by itself.
    """
    tensors = {}
    for arrays in variables:
        for name, array in arrays.items():
            target = find_inverse(name, table)
            assert target is not None, name
            torch_name, layout = target
            tensors[torch_name] = np.ascontiguousarray(layout.to_torch(np.asarray(array)))
    return tensors


def is_float(array: np.ndarray) -> bool:
    """Returns whether an array holds floats, bfloat16 among them."""
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def as_float32(array: np.ndarray) -> np.ndarray:
    """Returns an array as float32; what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _torch_name(name: str, table: Table) -> str:
    target = find_inverse(name, table)
    assert target is not None, name
    return target[0]
