"""A run's steps as programs for its devices: jitted, sharded, and compiled ahead of their use.

State and shardings are declared and the training state is donated. There is no `pmap` (legacy in
today's JAX): the batch is sharded over a mesh, the rest is replicated.
"""

import concurrent.futures
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from fetal_flax.config import TrainConfig
from fetal_flax.data.batch import Batch, BatchRecipe, DeviceDataset, gather_batch
from fetal_flax.data.photometric import UNCHANGED, Photometric
from fetal_flax.models import functional
from fetal_flax.models.convolution import compiler_options
from fetal_flax.models.functional import Variables
from fetal_flax.training.sharding import batch_sharding, replicate, replicated, step_sharding
from fetal_flax.training.step import (
    Metrics,
    TrainState,
    encode_step,
    initial_state,
    train_chunk,
    train_step,
    validation_step,
)


class Programs(NamedTuple):
    """The jitted functions of a run; none of them is compiled before its first call."""

    train_step: jax.stages.Wrapped
    """(TrainState, pos_weight, Batch) → (TrainState, Metrics)."""
    train_chunk: jax.stages.Wrapped
    """(TrainState, pos_weight, DeviceDataset, BatchRecipe) or (TrainState, pos_weight, None, Batch)
    → (TrainState, Metrics): steps one after the other in one call; batches, recipes and metrics
    have a leading axis of steps."""
    validation_step: jax.stages.Wrapped
    """(Variables, pos_weight, Batch, features or None) → Metrics."""
    encode_step: jax.stages.Wrapped
    """(Variables, Batch) → features of a network with an encoder."""
    gather_batch: jax.stages.Wrapped
    """(DeviceDataset, BatchRecipe of one step) → its Batch."""


def create_programs(config: TrainConfig, mesh: Mesh, *, steps_per_epoch: int = 1) -> Programs:
    """Returns the steps of a run as functions to call.

    Args:
        config: The run.
        mesh: Devices that share the batch.
        steps_per_epoch: What warm-up and cosine count epochs by.
    """
    whole, split, stacked = replicated(mesh), batch_sharding(mesh), step_sharding(mesh)
    settings = {"config": config, "steps_per_epoch": steps_per_epoch}
    chunk = functools.partial(train_chunk, batch_sharding=split, **settings)

    def train(
        state: TrainState, pos_weight: float | Array, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        return train_step(state, batch, pos_weight=pos_weight, **settings)

    def validate(
        variables: Variables, pos_weight: float | Array, batch: Batch, features: Any
    ) -> Metrics:
        return validation_step(variables, batch, features, config=config, pos_weight=pos_weight)

    def gather(dataset: DeviceDataset, recipe: BatchRecipe) -> Batch:
        one_step = jax.tree.map(lambda a: a[0], recipe)
        soft_masks = config.data.soft_masks
        return gather_batch(dataset, one_step, config.model.in_channels, soft_masks=soft_masks)

    options = compiler_options(deterministic=config.deterministic)
    jit = functools.partial(jax.jit, compiler_options=options)
    trained = {"out_shardings": (whole, whole), "donate_argnums": 0}
    return Programs(
        jit(train, in_shardings=(whole, whole, split), **trained),
        jit(chunk, in_shardings=(whole, whole, whole, stacked), **trained),
        jit(validate, in_shardings=(whole, whole, split, split), out_shardings=whole),
        jit(
            functools.partial(encode_step, config=config),
            in_shardings=(whole, split),
            out_shardings=split,
        ),
        jit(gather, in_shardings=(whole, stacked), out_shardings=split),
    )


def create_state(config: TrainConfig, variables: Variables, mesh: Mesh) -> TrainState:
    """Returns the state before the first step, on every device of the mesh."""
    # In one program: by themselves, the moments' zeros are one for each shape.
    create = jax.jit(functools.partial(initial_state, config), out_shardings=replicated(mesh))
    return create(replicate(variables, mesh))


class BackgroundCompilation:
    """A program that a thread compiles; the first call waits for it.

    Args:
        compile_program: Does it.
    """

    def __init__(self, compile_program: Callable[[], jax.stages.Compiled]):
        self.seconds = 0.0
        """What it took."""
        pool = concurrent.futures.ThreadPoolExecutor(1)
        self._compiled = pool.submit(self._timed, compile_program)
        pool.shutdown(wait=False)

    @property
    def compiled(self) -> jax.stages.Compiled:
        """The compiled program."""
        return self._compiled.result()

    def __call__(self, *arguments: Any) -> Any:
        """Calls the program."""
        return self.compiled(*arguments)

    def _timed(self, compile_program: Callable[[], jax.stages.Compiled]) -> jax.stages.Compiled:
        start = time.perf_counter()
        compiled = compile_program()
        self.seconds = time.perf_counter() - start
        return compiled


def compile_train_chunk(
    config: TrainConfig, programs: Programs, *, records: int | None, steps: int
) -> BackgroundCompilation:
    """Begins to compile a call of `programs.train_chunk`; the arguments are `chunk_arguments`'."""
    arguments = chunk_arguments(config, records=records, steps=steps)
    return BackgroundCompilation(lambda: programs.train_chunk.lower(*arguments).compile())


def chunk_arguments(
    config: TrainConfig, *, records: int | None, steps: int
) -> tuple[TrainState, Any, DeviceDataset | None, Batch | BatchRecipe]:
    """Returns the shapes and dtypes of what a call of `Programs.train_chunk` takes.

    Args:
        config: The run.
        records: Images of the data set that is on the devices; None where the host makes batches.
        steps: Steps that a call does.
    """
    variables = functional.shapes(config.model)
    state = jax.eval_shape(functools.partial(initial_state, config), variables)
    rows, size = (steps, config.schedule.batch_size), config.data.image_size
    photometric = None
    if config.augmentation.photometric:
        photometric = Photometric(*(_shape(rows, part.dtype) for part in UNCHANGED))
    if records is None:
        dataset = None
        items = Batch(
            image=_shape((*rows, *size, config.model.in_channels), np.uint8),
            mask=_shape((*rows, *size, 1), np.uint8),
            valid=_shape(rows, np.bool_),
            index=_shape(rows, np.int32),
            photometric=photometric,
        )
    else:
        images = _shape((records, *size), np.uint8)
        dataset = DeviceDataset(images, images)
        items = BatchRecipe(
            indices=_shape(rows, np.int32),
            affine=_shape((*rows, 2, 3), np.float32),
            photometric=photometric,
        )
    return state, _shape((), np.float32), dataset, items


def _shape(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
