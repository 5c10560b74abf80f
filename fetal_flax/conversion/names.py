"""PyTorch names and layouts of the networks, as data that is read in both directions.

A table lists every tensor that a layout can have; a name that isn't in it is an error, and so is
a variable that no name reaches (transfer.py). The two directions are exact inverses.
"""

import functools
import re
from typing import NamedTuple

import numpy as np

Tensors = dict[str, np.ndarray]


class Layout(NamedTuple):
    """How a PyTorch tensor becomes ours: transposed, then without `dropped` leading axes of 1."""

    axes: tuple[int, ...]
    dropped: int = 0

    def to_ours(self, tensor: np.ndarray) -> np.ndarray | None:
        """Returns a tensor in our layout, or None where its rank can't be."""
        if tensor.ndim != len(self.axes):
            return None
        array = tensor.transpose(self.axes)
        if set(array.shape[: self.dropped]) - {1}:
            return None
        return array.reshape(array.shape[self.dropped :])

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Returns an array in PyTorch's layout."""
        return array.reshape((1,) * self.dropped + array.shape).transpose(np.argsort(self.axes))


CONV = Layout((2, 3, 1, 0))  # OIHW → HWIO; a depthwise (C, 1, 3, 3) becomes (3, 3, 1, C)
UP_CONV = Layout((0, 2, 3, 1))  # transposed convolution, IOHW → IHWO, not flipped
DENSE = Layout((2, 3, 1, 0), dropped=2)  # a 1×1 convolution on a 1×1 map is a dense layer
VECTOR = Layout((0,))


class Rule(NamedTuple):
    """A PyTorch name and our name of the same tensor."""

    torch: str
    ours: str
    layout: Layout


Rules = tuple[Rule, ...]


class Table(Rules):
    """The tensors of a layout, to be looked up by either name."""

    @functools.cached_property
    def by_torch(self) -> dict[str, Rule]:
        """Each rule under its PyTorch name."""
        return {rule.torch: rule for rule in self}

    @functools.cached_property
    def by_ours(self) -> dict[str, Rule]:
        """Each rule under our name."""
        # Where PyTorch has two names, the first in the table is the one to write.
        return {rule.ours: rule for rule in reversed(self)}


def find(name: str, table: Table) -> tuple[str, Layout] | None:
    """Returns our name and the layout for a PyTorch name; None where the table lacks it."""
    rule = table.by_torch.get(name)
    return None if rule is None else (rule.ours, rule.layout)


def find_inverse(name: str, table: Table) -> tuple[str, Layout] | None:
    """Returns the PyTorch name and the layout for our name; None where the table lacks it."""
    rule = table.by_ours.get(name)
    return None if rule is None else (rule.torch, rule.layout)


def _norm(torch: str, ours: str) -> Rules:
    fields = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return tuple(Rule(f"{torch}.{t}", f"{ours}/{o}", VECTOR) for t, o in fields.items())


def _conv_norm(conv: str, norm: str, ours: str) -> Rules:
    return (Rule(f"{conv}.weight", f"{ours}/conv/kernel", CONV), *_norm(norm, f"{ours}/norm"))


def _separable(conv: str, ours: str) -> Rules:
    """The two kernels where the compact variant has a separable convolution."""
    parts = {"0": "depthwise", "1": "pointwise"}
    return tuple(
        Rule(f"{conv}.{n}.weight", f"{ours}/conv/{part}/kernel", CONV) for n, part in parts.items()
    )


def _with_bias(torch: str, ours: str, layout: Layout) -> Rules:
    return (
        Rule(f"{torch}.weight", f"{ours}/kernel", layout),
        Rule(f"{torch}.bias", f"{ours}/bias", VECTOR),
    )


def _excitation(torch: str, ours: str) -> Rules:
    return (
        *_with_bias(f"{torch}.excitation.0", f"{ours}/squeeze", DENSE),
        *_with_bias(f"{torch}.excitation.2", f"{ours}/excite", DENSE),
    )


def _double_conv(torch: str, ours: str) -> Rules:
    return (
        *_conv_norm(f"{torch}.0", f"{torch}.1", f"{ours}/first"),
        *_conv_norm(f"{torch}.3", f"{torch}.4", f"{ours}/second"),
    )


def _mobilenet_v2(prefix: str) -> Rules:
    """`torchvision.models.mobilenet_v2().features`; its first block has no expansion."""
    ours = "encoder/blocks"
    rules = [
        *_conv_norm(f"{prefix}.0.0", f"{prefix}.0.1", f"{ours}/0"),
        *_conv_norm(f"{prefix}.1.conv.0.0", f"{prefix}.1.conv.0.1", f"{ours}/1/depthwise"),
        *_conv_norm(f"{prefix}.1.conv.1", f"{prefix}.1.conv.2", f"{ours}/1/project"),
        *_conv_norm(f"{prefix}.18.0", f"{prefix}.18.1", f"{ours}/18"),
    ]
    for n in range(2, 18):
        block = f"{prefix}.{n}.conv"
        rules += _conv_norm(f"{block}.0.0", f"{block}.0.1", f"{ours}/{n}/expand")
        rules += _conv_norm(f"{block}.1.0", f"{block}.1.1", f"{ours}/{n}/depthwise")
        rules += _conv_norm(f"{block}.2", f"{block}.3", f"{ours}/{n}/project")
    return tuple(rules)


def _encoder_network() -> Rules:
    """What both networks with the encoder have."""
    return (
        *_mobilenet_v2("encoder"),
        *_conv_norm("init_conv.0", "init_conv.1", "init_conv"),
        *(rule for n in STAGES for rule in _with_bias(f"up{n}", f"stage{n}/up", UP_CONV)),
        *_with_bias("out_conv", "head", CONV),
    )


def _aspp() -> Rules:
    torch, branches = "bottleneck_aspp", "bottleneck_aspp.atrous_convs"
    rules = [
        *_conv_norm(f"{torch}.conv1x1.0", f"{torch}.conv1x1.1", "aspp/point"),
        Rule(f"{torch}.global_avg_pool.1.weight", "aspp/pool_conv/kernel", CONV),
        *_norm(f"{torch}.global_avg_pool.2", "aspp/pool_norm")[:2],  # GroupNorm: no statistics
        *_conv_norm(f"{torch}.project.0", f"{torch}.project.1", "aspp/project"),
    ]
    for n in range(3):
        rules += _conv_norm(f"{branches}.{n}.0", f"{branches}.{n}.1", f"aspp/atrous/{n}")
        rules += _separable(f"{branches}.{n}.0", f"aspp/atrous/{n}")
    return tuple(rules)


def _se_stages() -> Rules:
    rules: list[Rule] = []
    for n in STAGES:
        torch, ours = f"dec{n}", f"stage{n}/block"
        rules += _excitation(f"skip{n}_se", f"stage{n}/skip_se")
        rules += _conv_norm(f"{torch}.conv1", f"{torch}.bn1", f"{ours}/first")
        rules += _conv_norm(f"{torch}.conv2", f"{torch}.bn2", f"{ours}/second")
        if n in SEPARABLE_STAGES:
            rules += _separable(f"{torch}.conv1", f"{ours}/first")
            rules += _separable(f"{torch}.conv2", f"{ours}/second")
        rules += _excitation(f"{torch}.se", f"{ours}/se")
        shortcut = f"{torch}.skip_connection"
        rules += _conv_norm(f"{shortcut}.0", f"{shortcut}.1", f"{ours}/shortcut")
    return tuple(rules)


def _unet() -> Rules:
    """The standard U-Net; its stages count the other way, the deepest is `up1`."""
    rules = [*_double_conv("inc.double_conv", "down1")]
    for n, ours in enumerate(("down2", "down3", "down4", "bottom"), 1):
        rules += _double_conv(f"down{n}.maxpool_conv.1.double_conv", ours)
    for n in range(1, 5):
        rules += _with_bias(f"up{n}.up", f"stage{5 - n}/up", UP_CONV)
        rules += _double_conv(f"up{n}.conv.double_conv", f"stage{5 - n}/block")
    rules += _with_bias("outc", "head", CONV)
    rules += _with_bias("outc.conv", "head", CONV)  # in other copies of the same code
    return tuple(rules)


STAGES = (5, 4, 3, 2, 1)
SEPARABLE_STAGES = (2, 1)  # of the compact variant

ENCODER = "mobilenet_v2"
"""Layout of torchvision's file, an encoder alone; the other layouts have the networks' names."""

TABLES: dict[str, Table] = {
    ENCODER: Table(_mobilenet_v2("features")),
    "mobilenet_aspp_se_unet": Table((*_encoder_network(), *_aspp(), *_se_stages())),
    "mobilenet_unet": Table(
        (
            *_encoder_network(),
            *_double_conv("bottleneck.conv", "bottleneck"),
            *(rule for n in STAGES for rule in _double_conv(f"dec{n}.conv", f"stage{n}/block")),
        )
    ),
    "unet": Table(_unet()),
}

# Counters that nothing reads, and the ImageNet classifier.
IGNORED = re.compile(r"(.*\.)?num_batches_tracked|classifier\..*")
