"""Small arrays as one vector, for GPUs, where every array that a step changes is a kernel or more.

Most arrays of a network are small: vectors of its batch norms. `train_chunk` has them as a few
vectors from its first step to its last; everywhere else a state is a tree of all arrays.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Vectors = dict[str, dict[str, tuple[int, ...]]]
"""Of each vector, by its name, the arrays that it consists of: their names and shapes."""


def pack(tree: Any, vectors: Vectors) -> Any:
    """Returns a tree in whose dicts of arrays, at any depth, vectors stand for their arrays."""
    packed_names = {name for arrays in vectors.values() for name in arrays}

    def pack_dict(arrays: dict[str, Any]) -> dict[str, Any]:
        packed = {name: a for name, a in arrays.items() if name not in packed_names}
        for vector, shapes in vectors.items():
            parts = [arrays[name] for name in shapes if name in arrays]
            if parts:
                # An optimizer of some parameters has this in the place of the others' moments.
                masked = isinstance(parts[0], optax.MaskedNode)
                packed[vector] = parts[0] if masked else jnp.concatenate([a.ravel() for a in parts])
        return packed

    return _map_dicts(pack_dict, tree, packed_names)


def unpack(tree: Any, vectors: Vectors) -> Any:
    """Returns the tree that `pack` has packed."""

    def unpack_dict(packed: dict[str, Any]) -> dict[str, Any]:
        arrays = dict(packed)
        for vector in [name for name in vectors if name in packed]:
            values, start = arrays.pop(vector), 0
            for name, shape in vectors[vector].items():
                end = start + math.prod(shape)
                masked = isinstance(values, optax.MaskedNode)
                arrays[name] = values if masked else values[start:end].reshape(shape)
                start = end
        return arrays

    return _map_dicts(unpack_dict, tree, set(vectors))


def _map_dicts(
    function: Callable[[dict[str, Any]], dict[str, Any]], tree: Any, names: set[str]
) -> Any:
    """Returns a tree with the function's results in the place of dicts with any of these names."""

    def is_meant(node: Any) -> bool:
        return isinstance(node, dict) and not names.isdisjoint(node)

    return jax.tree.map(lambda n: function(n) if is_meant(n) else n, tree, is_leaf=is_meant)
