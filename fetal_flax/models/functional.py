"""The networks as pure functions of flat, named arrays.

`nnx.split` happens once per config; training, conversion and checkpoints see two dicts from
names such as `aspp/atrous/0/conv/kernel` to arrays, which jit, optax and orbax take as they are.
"""

import functools
from typing import NamedTuple, cast

import jax
from flax import nnx, traverse_util
from jaxtyping import Array

from fetal_flax.config import ModelConfig
from fetal_flax.models import folding
from fetal_flax.models.init import HostRngs
from fetal_flax.models.interface import EncoderFeatures, Logits, as_input
from fetal_flax.models.layers import FeatureMap
from fetal_flax.models.registry import Network, create_model
from fetal_flax.models.unet import UNet

Arrays = dict[str, Array]

ENCODER = "encoder/"
STEM = "encoder/blocks/0/conv/kernel"


class Variables(NamedTuple):
    """A network's arrays by name, or their shapes."""

    params: Arrays
    batch_stats: Arrays


def create(config: ModelConfig, seed: int | None) -> Network:
    """Returns a freshly initialised network, as the module that it is; None draws nothing."""
    return create_model(config, rngs=cast(nnx.Rngs, HostRngs(seed)))


def init(config: ModelConfig, seed: int) -> Variables:
    """Returns freshly initialised variables."""
    return _variables(create(config, seed))


def shapes(config: ModelConfig) -> Variables:
    """Returns the variables' shapes and dtypes."""
    return _structure(config).shapes


def encoder_part(variables: Variables) -> Variables:
    """Returns the encoder's variables alone; none of a network that has no encoder."""
    return Variables(
        *({n: a for n, a in arrays.items() if n.startswith(ENCODER)} for arrays in variables)
    )


def apply(
    config: ModelConfig,
    variables: Variables,
    images: FeatureMap,
    *,
    train: bool = False,
    train_encoder: bool = False,
    dropout_key: Array | None = None,
    features: EncoderFeatures | None = None,
) -> tuple[Logits, Arrays]:
    """Runs the network.

    Args:
        config: Which network.
        variables: Its parameters and batch statistics.
        images: In [0, 1].
        train: Batch statistics and dropout in everything but the encoder.
        train_encoder: Batch statistics in the encoder.
        dropout_key: Needed with `train` by networks with dropout.
        features: What `encode` has made of the images, where the encoder need not run.

    Returns:
        Logits, and the batch statistics after the call.

    Raises:
        InputError: The images' shape doesn't fit the network.
    """
    network = merge(config, variables)
    # Scaling kernels is cheaper than normalising maps, also if it is done in every call.
    if not train:
        folding.fold_norms(network)
    elif not train_encoder and not isinstance(network, UNet):
        folding.fold_norms(network.encoder)
    logits = network(
        images, train=train, train_encoder=train_encoder, dropout_key=dropout_key, features=features
    )
    return logits, variables.batch_stats | _flatten(nnx.state(network, nnx.BatchStat))


def encode(config: ModelConfig, variables: Variables, images: FeatureMap) -> EncoderFeatures:
    """Returns a MobileNetV2 encoder's features of images in [0, 1], in evaluation, for `apply`.

    Raises:
        InputError: The images' shape doesn't fit the network.
    """
    network = merge(config, variables)
    assert not isinstance(network, UNet)
    folding.fold_norms(network.encoder)
    images = as_input(images, config, network.divisor)
    return tuple(network.encoder(images, train=False))


@functools.partial(jax.jit, static_argnums=0)
def fold(config: ModelConfig, variables: Variables) -> Arrays:
    """Returns the arrays of the network that models/folding.py makes for evaluation."""
    network = merge(config, variables)
    folding.fold(network)
    return _flatten(nnx.state(network))


def infer(config: ModelConfig, folded: Arrays, images: FeatureMap) -> Logits:
    """Returns the logits of images in [0, 1] as `apply` does, from what `fold` returned.

    Raises:
        InputError: The images' shape doesn't fit the network.
    """
    network = _structure(config, folded=True).merge(folded)
    if len(images) > 1 and jax.default_backend() == "cpu":
        # One image's maps nearly fit into the cache; a batch's do not, and asking the system for
        # their memory anew in every call takes a third of the time.
        return jax.lax.map(lambda image: network(image[None])[0], images)
    return network(images)


def merge(config: ModelConfig, variables: Variables) -> Network:
    """Returns the network with these variables, as the module that it is."""
    params, batch_stats = variables
    return _structure(config).merge(params | batch_stats)


class _Structure(NamedTuple):
    """A network without its arrays."""

    graph: nnx.GraphDef
    paths: dict[str, tuple]
    """Where the arrays belong, by their flat names."""
    shapes: Variables

    def merge(self, arrays: Arrays) -> Network:
        """Returns the network with these arrays."""
        nested = traverse_util.unflatten_dict({self.paths[name]: a for name, a in arrays.items()})
        return nnx.merge(self.graph, nested)


@functools.lru_cache
def _structure(config: ModelConfig, *, folded: bool = False) -> _Structure:
    def build() -> Network:
        network = create(config, seed=None)
        if folded:
            folding.fold(network)
        return network

    network = nnx.eval_shape(build)
    graph, state = nnx.split(network)
    paths = {_name(path): path for path, _ in nnx.to_flat_state(state)}
    return _Structure(graph, paths, _variables(network))


def _variables(network: Network) -> Variables:
    _, params, batch_stats = nnx.split(network, nnx.Param, nnx.BatchStat)
    return Variables(_flatten(params), _flatten(batch_stats))


def _flatten(state: nnx.State) -> Arrays:
    return {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def _name(path: tuple) -> str:
    return "/".join(map(str, path))
