"""PyTorch names and layouts of each part of the networks, as data.

A table is read from the top; the first pattern that matches a whole name decides. Names that no
pattern matches are errors, and so are targets that no name reaches (transfer.py).
"""

import re
from typing import NamedTuple

import numpy as np

CONV = (2, 3, 1, 0)  # OIHW → HWIO; a depthwise (C, 1, 3, 3) becomes (3, 3, 1, C)
VECTOR = (0,)


class Rule(NamedTuple):
    """Where a tensor goes."""

    pattern: str
    """Regular expression that matches the whole PyTorch name."""
    target: str
    """Name in the network; backslash and number stand for the pattern's groups."""
    axes: tuple[int, ...]
    """How `numpy.transpose` turns PyTorch's layout into ours."""


def _norm(torch_name: str, target: str) -> tuple[Rule, ...]:
    """Rules of one batch norm; a further group stands before the field's."""
    fields = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return tuple(
        Rule(rf"{torch_name}\.{field}", f"{target}/{ours}", VECTOR)
        for field, ours in fields.items()
    )


def _conv_norm(conv: str, norm: str, target: str) -> tuple[Rule, ...]:
    return (Rule(rf"{conv}\.weight", f"{target}/conv/kernel", CONV), *_norm(norm, f"{target}/norm"))


# torchvision.models.mobilenet_v2().features; the first block has no expansion.
MOBILENET_V2 = (
    *_conv_norm(r"features\.(0|18)\.0", r"features\.(0|18)\.1", r"encoder/blocks/\1"),
    *_conv_norm(
        r"features\.1\.conv\.0\.0", r"features\.1\.conv\.0\.1", "encoder/blocks/1/depthwise"
    ),
    *_conv_norm(r"features\.1\.conv\.1", r"features\.1\.conv\.2", "encoder/blocks/1/project"),
    *_conv_norm(
        r"features\.(\d+)\.conv\.0\.0", r"features\.(\d+)\.conv\.0\.1", r"encoder/blocks/\1/expand"
    ),
    *_conv_norm(
        r"features\.(\d+)\.conv\.1\.0",
        r"features\.(\d+)\.conv\.1\.1",
        r"encoder/blocks/\1/depthwise",
    ),
    *_conv_norm(
        r"features\.(\d+)\.conv\.2", r"features\.(\d+)\.conv\.3", r"encoder/blocks/\1/project"
    ),
)

# Counters that nothing reads, and the ImageNet classifier.
IGNORED = re.compile(r"(.*\.)?num_batches_tracked|classifier\..*")

Tensors = dict[str, np.ndarray]
