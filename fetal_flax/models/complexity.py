"""How many parameters and multiply-accumulates each part of a network has."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fetal_flax.config import ModelConfig
from fetal_flax.models import functional
from fetal_flax.models.interface import Logits
from fetal_flax.models.layers import Conv, FeatureMap, UpConv

DESCRIPTION: dict[str, float] = {
    "parameters": 3_403_809,
    "trainable": 1_192_737,
    "frozen": 2_211_072,
    "gflops": 2.8,
    "megabytes": 13,
}
"""The written description's own figures for the proposed network (section 9)."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a network: the first component of its variables' names."""

    name: str
    parameters: int
    frozen: int
    """Parameters that don't learn."""
    macs: int
    """Multiply-accumulates of one image's forward pass."""

    @property
    def trainable(self) -> int:
        """Parameters that learn."""
        return self.parameters - self.frozen


@dataclasses.dataclass(frozen=True)
class Summary:
    """A network's parts in the order in which an image passes them."""

    config: ModelConfig
    image_size: tuple[int, int]
    """Height and width that the multiply-accumulates are for."""
    parts: tuple[Part, ...]

    @property
    def total(self) -> Part:
        """The sum over the parts."""
        return Part(
            "total",
            parameters=sum(part.parameters for part in self.parts),
            frozen=sum(part.frozen for part in self.parts),
            macs=sum(part.macs for part in self.parts),
        )


def summarize(
    config: ModelConfig, encoder_trainable: bool, *, image_size: tuple[int, int] = (256, 256)
) -> Summary:
    """Counts a network's parameters and multiply-accumulates; nothing is computed.

    Batch statistics are no parameters. Multiply-accumulates are those of convolutions,
    transposed convolutions and dense layers, counted densely: every tap of every kernel at every
    output pixel, taps that read padding included, whatever form of the sum models/convolution.py
    picks. Normalisation, activations, pooling, sums and biases are left out.

    Args:
        config: Which network.
        encoder_trainable: Whether the encoder learns.
        image_size: Height and width of the image.

    Raises:
        InputError: The network doesn't take images of this size.
    """
    parameters, frozen = Counter(), Counter()
    for name, array in functional.shapes(config).params.items():
        part = name.split("/")[0]
        parameters[part] += array.size
        if name.startswith(functional.ENCODER) and not encoder_trainable:
            frozen[part] += array.size
    macs = _macs_by_part(config, image_size)
    assert macs.keys() == parameters.keys(), "a part without a layer that is counted"
    return Summary(
        config,
        image_size,
        tuple(Part(name, parameters[name], frozen[name], macs[name]) for name in macs),
    )


class _Counted(nnx.Module):
    """A layer that notes its multiply-accumulates under `part` when it is called."""

    def __init__(self, layer: Conv | UpConv | nnx.Linear, part: str, macs: Counter[str]):
        self.layer = layer
        self.part = part
        self.macs = nnx.static(macs)

    def __call__(self, *maps: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        y = self.layer(*maps)
        # A transposed convolution applies its kernel once per input pixel, the others once per
        # output pixel.
        positions = (maps[0] if isinstance(self.layer, UpConv) else y)[..., 0].size
        self.macs[self.part] += positions * self.layer.kernel.size
        return y


@functools.cache
def _macs_by_part(config: ModelConfig, image_size: tuple[int, int]) -> Counter[str]:
    """Returns the parts' multiply-accumulates, parts in the order of the forward pass."""
    macs: Counter[str] = Counter()

    def forward(images: FeatureMap) -> Logits:
        network = functional.create(config, seed=None)
        owners = dict(nnx.iter_modules(network))
        for path, layer in owners.items():
            if isinstance(layer, (Conv, UpConv, nnx.Linear)):
                setattr(owners[path[:-1]], str(path[-1]), _Counted(layer, str(path[0]), macs))
        return network(images)

    jax.eval_shape(forward, jax.ShapeDtypeStruct((1, *image_size, config.in_channels), jnp.float32))
    return macs
