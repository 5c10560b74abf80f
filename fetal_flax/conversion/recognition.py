"""Which network a PyTorch state dict is of, and its variables."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fetal_flax import checkpoints
from fetal_flax.config import ModelConfig
from fetal_flax.conversion.names import ENCODER, TABLES, find
from fetal_flax.conversion.reader import read_state_dicts
from fetal_flax.conversion.transfer import from_state_dict, is_float
from fetal_flax.errors import InputError, printable
from fetal_flax.models import functional
from fetal_flax.models.aspp import WIDTH_UNIT
from fetal_flax.models.functional import Variables
from fetal_flax.models.mobilenet_aspp_se_unet import VARIANTS

STEM = "features.0.0.weight"
"""First kernel of torchvision's file."""
_PREFIX_PARTS = 4  # of names, that wrappers may have put before them
_LEAST_SHARE = 0.2  # of a state dict's names, that a network in it has
_MOST_CHANNELS = 4096  # wider first layers are damage, not a setting


class Network(NamedTuple):
    """What a PyTorch file holds, in our terms."""

    kind: checkpoints.Kind
    model: ModelConfig
    """The network; of an encoder, one that it fits."""
    variables: Variables
    entry: str = ""
    """Where in the file it was; empty for the whole."""
    other_entries: tuple[str, ...] = ()
    """Those where another such network is."""


class NamedTensors(NamedTuple):
    """The tensors of a file that are a network's, by the network's own names."""

    tensors: dict[str, np.ndarray]
    keys: tuple[str, ...]
    """The way to their dict in the file."""
    prefix: str
    """What wrappers put before the names, such as `module.`."""
    others: tuple[str, ...] = ()
    """Entries of the file that fit as well."""

    @property
    def entry(self) -> str:
        """How `find_tensors` names this part of the file; empty for the whole."""
        return ".".join((*self.keys, *self.prefix.split("."))).strip(".")


def read_network(path: Path, *, channels: int | None = None, entry: str | None = None) -> Network:
    """Reads a whole network or a MobileNetV2 encoder, whichever the file holds.

    Args:
        path: A file of `torch.save` or a safetensors file.
        channels: As in `convert_state_dict`.
        entry: As in `find_tensors`.

    Raises:
        InputError: The file can't be read, or what `convert_state_dict` raises.
    """
    found = find_tensors(path, entry=entry)
    network = convert_state_dict(found.tensors, source=str(path), channels=channels)
    return network._replace(entry=found.entry, other_entries=found.others)


def find_tensors(path: Path, *, entry: str | None = None) -> NamedTensors:
    """Finds a network's tensors in a file, whatever they are wrapped in.

    Wrappers are dicts around the state dict (`model_state_dict`, `ema`, ...) and beginnings of its
    names (`module.` of `DataParallel`, `_orig_mod.` of `torch.compile`, `model.` of Lightning).
    Taken is what the most names are known of; of several alike, the first, where
    `model_state_dict`, `state_dict` and `model` go before all others.

    Args:
        path: A file of `torch.save` or a safetensors file.
        entry: Which of several to take, such as `ema`.

    Raises:
        InputError: The file can't be read, or has no such entry.
    """
    candidates: list[tuple[int, NamedTensors]] = []
    for state in read_state_dicts(path):
        for prefix in _prefixes(state.tensors):
            tensors = {
                name.removeprefix(prefix): tensor
                for name, tensor in state.tensors.items()
                if name.startswith(prefix)
            }
            candidates.append((_most_known(tensors)[1], NamedTensors(tensors, state.keys, prefix)))
    most = max(known for known, _ in candidates)
    fitting = [candidate for known, candidate in candidates if known == most]
    if not most:
        fitting = fitting[:1]
    if entry is not None:
        named = [c for c in fitting if f"{c.entry}.".startswith(f"{entry}.")]
        if not named:
            known = ", ".join(printable(c.entry) or "none" for c in fitting)
            raise InputError(f"{path} has no network as its entry {printable(entry)}: give {known}")
        return named[0]
    return fitting[0]._replace(others=tuple(candidate.entry for candidate in fitting[1:]))


def _prefixes(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Returns the beginnings, up to a dot, that many names share; the empty one first."""
    counts: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".", _PREFIX_PARTS)
        counts.update(".".join(parts[:n]) + "." for n in range(1, len(parts)))
    return ["", *(prefix for prefix, n in counts.items() if n > _LEAST_SHARE * len(tensors))]


def convert_state_dict(
    tensors: Mapping[str, np.ndarray], *, source: str, channels: int | None = None
) -> Network:
    """Recognises a state dict and returns what it holds in our names and layout.

    Known are torchvision's MobileNetV2 and the published networks, whose layout is also what
    `convert --to-torch` writes. Variant and widths are read off the tensors.

    Args:
        tensors: PyTorch names and arrays.
        source: How errors name the file.
        channels: Image channels wanted. An encoder for RGB becomes one for grey images if this is
            1 or None; a whole network must have just these.

    Raises:
        InputError: It is none of these networks, whole and finite.
    """
    layout = _recognise(tensors, source)
    if layout == ENCODER:
        model = ModelConfig(in_channels=3 if channels == 3 else 1)
        expected = functional.encoder_part(functional.shapes(model))
        stem = tensors.get(STEM)
        # A strange stem stays as it is, and is listed with all the others.
        if model.in_channels == 1 and stem is not None and stem.shape[1:] == (3, 3, 3):
            tensors = {**tensors, STEM: grey_stem(stem) if is_float(stem) else stem}
    else:
        model = _settings(layout, tensors)
        expected = functional.shapes(model)
        if channels not in (None, model.in_channels):
            raise InputError(
                f"{source} holds a network for images with {model.in_channels} channels, not "
                f"{channels}: only torchvision's encoder can change, so leave channels as they are"
            )
    title = "torchvision's mobilenet_v2" if layout == ENCODER else model.title
    variables = from_state_dict(tensors, TABLES[layout], expected, source=source, network=title)
    return Network("encoder" if layout == ENCODER else "network", model, variables)


def grey_stem(kernel: np.ndarray) -> np.ndarray:
    """Returns the mean of a stem's kernel, OIHW, over its input channels (description, 1.2).

    The mean, not the sum: an image in [0, 1] then meets the same range as one grey RGB channel.
    """
    return kernel.mean(1, keepdims=True)


def _most_known(tensors: Mapping[str, np.ndarray]) -> tuple[str, int]:
    """Returns the layout that knows most of the names, and how many."""
    known = {
        layout: sum(find(name, table) is not None for name in tensors)
        for layout, table in TABLES.items()
    }
    layout = max(known, key=known.__getitem__)
    return layout, known[layout]


def _recognise(tensors: Mapping[str, np.ndarray], source: str) -> str:
    """Returns the layout that knows most of the names."""
    layout, known = _most_known(tensors)
    if not known:
        names = ", ".join(map(printable, sorted(tensors)[:3]))
        raise InputError(
            f"{source} is of no known network (it holds {names}, …): give a state dict of "
            "torchvision's mobilenet_v2 or of a published mobilenet_aspp_se_unet, mobilenet_unet "
            "or unet"
        )
    return layout


def _settings(layout: str, tensors: Mapping[str, np.ndarray]) -> ModelConfig:
    """Reads a network's settings off its tensors.

    A tensor that is missing or strange leaves the default, and is listed with all the others.
    """

    def size(name: str, axis: int) -> int:
        shape = tensors[name].shape if name in tensors else ()
        return shape[axis] if len(shape) == 4 and shape[axis] <= _MOST_CHANNELS else 0

    channels = size("inc.double_conv.0.weight" if layout == "unet" else "init_conv.0.weight", 1)
    settings: dict[str, Any] = {"name": layout, "in_channels": channels if channels == 3 else 1}
    if layout == "unet":
        settings["base_width"] = size("inc.double_conv.0.weight", 0) or ModelConfig.base_width
    if layout == "mobilenet_aspp_se_unet":
        settings["variant"] = variant = _variant(tensors)
        width = size("bottleneck_aspp.conv1x1.0.weight", 0)
        if width % WIDTH_UNIT == 0 and width not in (0, VARIANTS[variant].aspp_width):
            settings["aspp_width"] = width
    return ModelConfig(**settings)


def _variant(tensors: Mapping[str, np.ndarray]) -> str:
    """Returns the variant that alone has tensors such as some of these."""
    targets = (find(name, TABLES["mobilenet_aspp_se_unet"]) for name in tensors)
    if any(target is not None and "/pointwise/" in target[0] for target in targets):
        return "compact"
    biased = any(".excitation." in name and name.endswith(".bias") for name in tensors)
    return "published" if biased else "described"
