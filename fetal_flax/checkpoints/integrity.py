"""Digests of arrays and descriptions, by which damage is noticed when a checkpoint is read."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def checked(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns a description's values and the digests beside them.

    Raises:
        ValueError: They don't agree.
    """
    values = dict(values)
    digests = values.pop("sha256", {})
    # Before the format is judged, lest a flipped digit passes for a newer version.
    if digests and digests["description"] != digest_of_json(values):
        raise ValueError("its description is not what was saved")
    return values, digests


def digest_of_arrays(tree: Any) -> str:
    """Returns the SHA-256 of names, types, shapes and values; the arrays are whole on each host."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        # Read through an object of its own: what JAX has read once it doesn't donate.
        array = np.asarray(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def digest_of_json(values: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
