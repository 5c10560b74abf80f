"""Strict transfer of a PyTorch state dict into a network's variables."""

import re
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from fetal_flax.conversion.tables import IGNORED, Rule, Tensors
from fetal_flax.errors import InputError
from fetal_flax.models.functional import STEM, Variables


def transfer(
    tensors: Mapping[str, np.ndarray],
    table: Sequence[Rule],
    expected: Variables,
    *,
    source: str,
) -> Variables:
    """Returns the variables that a state dict holds, as float32 arrays in our names and layout.

    Args:
        tensors: PyTorch names and arrays.
        table: Which name goes where.
        expected: Shapes of the variables to fill, all of them. Where the network takes grey
            images, a stem for RGB becomes the mean of its three input channels.
        source: How errors name the file.

    Raises:
        InputError: Names are missing or surplus, shapes differ, or values are not finite
            floats; all of it is listed at once.
    """
    found, problems = _rename(tensors, table)
    shapes = {name: array.shape for arrays in expected for name, array in arrays.items()}
    if STEM in found and STEM in shapes and shapes[STEM][2] == 1:
        found[STEM] = grey_stem(found[STEM])
    problems += [f"surplus {name}" for name in sorted(found.keys() - shapes.keys())]
    problems += [f"missing {name}" for name in sorted(shapes.keys() - found.keys())]
    for name in sorted(found.keys() & shapes.keys()):
        array = found[name]
        if array.shape != shapes[name]:
            problems.append(f"{name} has shape {array.shape}, not {shapes[name]}")
        elif array.dtype.kind != "f" and array.dtype.name != "bfloat16":
            problems.append(f"{name} holds {array.dtype}, not floats")
        elif not np.isfinite(array.astype(np.float32)).all():
            problems.append(f"{name} holds values that are not finite")
    if problems:
        raise InputError(
            f"{source} doesn't fit the network: {'; '.join(problems)}: "
            "give a state dict of torchvision's mobilenet_v2"
        )
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in found.items()}
    return Variables(
        params={name: arrays[name] for name in expected.params},
        batch_stats={name: arrays[name] for name in expected.batch_stats},
    )


def grey_stem(kernel: np.ndarray) -> np.ndarray:
    """Returns the mean of a stem's kernel, HWIO, over its input channels (description, 1.2).

    The mean, not the sum: an image in [0, 1] then meets the same range as one grey RGB channel.
    """
    return kernel.mean(2, keepdims=True)


def _rename(tensors: Mapping[str, np.ndarray], table: Sequence[Rule]) -> tuple[Tensors, list[str]]:
    found, problems = {}, []
    for name, array in tensors.items():
        if IGNORED.fullmatch(name):
            continue
        for rule in table:
            match = re.fullmatch(rule.pattern, name)
            if match and array.ndim == len(rule.axes):
                found[match.expand(rule.target)] = array.transpose(rule.axes)
                break
        else:
            problems.append(f"surplus {name} with shape {array.shape}")
    return found, problems
