"""The networks as pure functions of flat, named arrays.

`nnx.split` happens once per config; training, conversion and checkpoints see two dicts from
names such as `aspp/atrous/0/conv/kernel` to arrays, which jit, optax and orbax take as they are.
"""

import contextlib
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jaxtyping import Array

from fetal_flax._util.backend import target_backend
from fetal_flax.config import ModelConfig
from fetal_flax.errors import InputError
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
    """A network's arrays by name, or their shapes: a pytree of two dicts.

    Example:
        >>> variables = ff.init(ff.ModelConfig(name="unet", base_width=4), seed=0)
        >>> variables.params["down1/first/conv/kernel"].shape
        (3, 3, 1, 4)
        >>> sorted(variables.batch_stats)[:2]
        ['bottom/first/norm/mean', 'bottom/first/norm/var']
    """

    params: Arrays
    batch_stats: Arrays


def create(config: ModelConfig, seed: int | None) -> Network:
    """Returns a freshly initialised network, as the module that it is; None draws nothing."""
    return create_model(config, rngs=cast(nnx.Rngs, HostRngs(seed)))


def init(config: ModelConfig, seed: int) -> Variables:
    """Returns freshly initialised variables, drawn as PyTorch draws them.

    Args:
        config: Which network.
        seed: Of the draws; 0 or larger.

    Returns:
        Parameters and batch statistics, float32.

    Raises:
        InputError: A setting doesn't fit the network.

    Example:
        >>> config = ff.ModelConfig(name="unet", base_width=4)
        >>> ff.init(config, seed=0).params["head/bias"].shape
        (1,)
    """
    return variables_of(create(config, seed))


def shapes(config: ModelConfig) -> Variables:
    """Returns the variables' shapes and dtypes."""
    return _structure(config).shapes


def encoder_part(variables: Variables) -> Variables:
    """Returns the encoder's variables alone; none of a network that has no encoder."""
    return Variables(
        *({n: a for n, a in arrays.items() if n.startswith(ENCODER)} for arrays in variables)
    )


def subtree(variables: Variables, name: str) -> Variables:
    """Returns the variables of one part of a network, under the names that the part has alone.

    Args:
        variables: A network's.
        name: The part's, such as `encoder`, `aspp`, `stage5/block` or `encoder/blocks/3`.

    Raises:
        InputError: The network has no such part.

    Example:
        >>> checkpoint = ff.load_checkpoint("runs/hc18")
        >>> part = ff.subtree(checkpoint.variables, "down1/first")
        >>> sorted(part.params), sorted(part.batch_stats)
        (['conv/kernel', 'norm/bias', 'norm/scale'], ['norm/mean', 'norm/var'])
    """
    prefix = name.rstrip("/") + "/"
    part = Variables(
        *(
            {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
            for arrays in variables
        )
    )
    if not part.params:
        parts = sorted({name.partition("/")[0] for name in variables.params})
        raise InputError(
            f"the network has no part {name!r}: give one of {', '.join(parts)}, or a part of these"
        )
    return part


def apply(
    config: ModelConfig,
    variables: Variables,
    images: FeatureMap,
    *,
    features: EncoderFeatures | None = None,
) -> Logits:
    """Returns the logits of images, with running statistics and without dropout.

    A pure function: `jax.jit` (config static), `jax.grad` and `jax.vmap` apply, and so do shardings
    over a mesh whose axes are Auto, as those of `jax.sharding.Mesh` are.

    Args:
        config: Which network.
        variables: Its parameters and batch statistics.
        images: Floats in [0, 1], (batch, height, width, channels); height and width are multiples
            of 32, of a `unet` of 16.
        features: What `encode` has made of the images, where the encoder need not run.

    Returns:
        (batch, height, width, 1), before the sigmoid, at least float32.

    Raises:
        InputError: The images' shape doesn't fit the network.

    Example:
        >>> config = ff.ModelConfig(name="unet", base_width=4)
        >>> variables, images = ff.init(config, seed=0), jnp.ones((2, 32, 64, 1))
        >>> apply = jax.jit(ff.apply, static_argnums=0)
        >>> apply(config, variables, images).shape
        (2, 32, 64, 1)
        >>> gradient = jax.jit(jax.grad(lambda v: ff.apply(config, v, images).mean()))
        >>> gradient(variables).params["head/bias"]
        Array([1.], dtype=float32)
    """
    network = merge(config, variables)
    with _products_of(config):
        # Scaling kernels is cheaper than normalising maps, also if it is done in every call.
        folding.fold_norms(network)
        return network(images, features=features)


def apply_train(
    config: ModelConfig,
    variables: Variables,
    images: FeatureMap,
    *,
    dropout_key: Array | None = None,
    train_encoder: bool = False,
    folded_encoder: Arrays | None = None,
) -> tuple[Logits, Arrays]:
    """Runs the network as in training, with the batch's statistics and with dropout; pure.

    Args:
        config: Which network.
        variables: Its parameters and batch statistics.
        images: As of `apply`.
        dropout_key: A key of `jax.random`; networks with dropout need one, all but `unet` and
            `mobilenet_unet`.
        train_encoder: Whether the encoder's batch norms take the batch's statistics too; a frozen
            encoder keeps its own.
        folded_encoder: What `fold_encoder` returned of these variables, where the encoder is
            frozen and several calls share it.

    Returns:
        Logits as of `apply`, and the batch statistics after the call, for the next one.

    Raises:
        InputError: The images' shape doesn't fit the network, or they are too few for statistics.

    Example:
        >>> config = ff.ModelConfig(name="unet", base_width=4)
        >>> variables, images = ff.init(config, seed=0), jnp.ones((2, 32, 64, 1))
        >>> apply_train = jax.jit(ff.apply_train, static_argnums=0)
        >>> logits, batch_stats = apply_train(config, variables, images)
        >>> variables = variables._replace(batch_stats=batch_stats)
    """
    network = merge(config, variables)
    if not train_encoder and not isinstance(network, UNet):
        folding.fold_norms(network.encoder)
        if folded_encoder is not None:
            folded = {
                path: folded_encoder[_name(path)]
                for path, _ in nnx.to_flat_state(nnx.state(network.encoder))
            }
            nnx.update(network.encoder, traverse_util.unflatten_dict(folded))
    # The backward pass's products are those of the forward pass, transposed, and like them.
    with _products_of(config):
        logits = network(images, train=True, train_encoder=train_encoder, dropout_key=dropout_key)
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
    with _products_of(config):
        return tuple(network.encoder(images, train=False))


def fold_encoder(config: ModelConfig, variables: Variables) -> Arrays:
    """Returns a frozen encoder's arrays as training uses them, for `apply_train`.

    Batch norms are part of the convolutions, and all is in the dtype that the network computes in.
    """
    network = merge(config, variables)
    assert not isinstance(network, UNet)
    folding.fold_norms(network.encoder)
    arrays = _flatten(nnx.state(network.encoder))
    if config.dtype != "bfloat16":
        return arrays
    return {name: array.astype(jnp.bfloat16) for name, array in arrays.items()}


@functools.partial(jax.jit, static_argnums=0)
def fold(config: ModelConfig, variables: Variables) -> Arrays:
    """Returns the arrays of the network that models/folding.py makes for evaluation."""
    network = merge(config, variables)
    with _products_of(config):
        folding.fold(network)
    return _flatten(nnx.state(network))


def infer(config: ModelConfig, folded: Arrays, images: FeatureMap) -> Logits:
    """Returns the logits of images in [0, 1] as `apply` does, from what `fold` returned.

    Raises:
        InputError: The images' shape doesn't fit the network.
    """
    backend = target_backend()
    network = _structure(config, folded_for=backend).merge(folded)
    if backend == "cpu" and len(images) > 1:
        # One image's maps nearly fit into the cache; a batch's do not, and asking the system for
        # their memory anew in every call takes a third of the time.
        return jax.lax.map(lambda image: network(image[None])[0], images)
    with _products_of(config):
        return network(images)


def _products_of(config: ModelConfig) -> contextlib.AbstractContextManager:
    """Returns the context in which products are as `matmul_precision` says."""
    # A CPU's products are float32 without being told, and a program that says it is another one.
    if config.matmul_precision == "default" or target_backend() == "cpu":
        return contextlib.nullcontext()
    return jax.default_matmul_precision(config.matmul_precision)


def merge(config: ModelConfig, variables: Variables) -> Network:
    """Returns the network with these variables, as the module that it is: an `nnx.Module`.

    Args:
        config: Which network.
        variables: Its parameters and batch statistics.

    Example:
        >>> checkpoint = ff.load_checkpoint("runs/hc18")
        >>> network = ff.merge(checkpoint.config, checkpoint.variables)
        >>> nnx.jit(network)(jnp.zeros((1, 64, 96, 1))).shape
        (1, 64, 96, 1)
    """
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
def _structure(config: ModelConfig, *, folded_for: str | None = None) -> _Structure:
    """Returns a network's structure, or that of the one which `fold` makes for a backend of it."""

    def build() -> Network:
        network = create(config, seed=None)
        if folded_for:
            folding.fold(network)
        return network

    network = nnx.eval_shape(build)
    graph, state = nnx.split(network)
    paths = {_name(path): path for path, _ in nnx.to_flat_state(state)}
    return _Structure(graph, paths, variables_of(network))


def variables_of(module: nnx.Module) -> Variables:
    """Returns a module's arrays by name: of a network the inverse of `merge`.

    Args:
        module: A network, or a block of one.

    Example:
        >>> model = ff.create_model("unet", base_width=4, rngs=nnx.Rngs(0))
        >>> ff.variables_of(model).params["head/bias"].shape
        (1,)
    """
    _, params, batch_stats = nnx.split(module, nnx.Param, nnx.BatchStat)
    return Variables(_flatten(params), _flatten(batch_stats))


def _flatten(state: nnx.State) -> Arrays:
    return {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def _name(path: tuple) -> str:
    return "/".join(map(str, path))
