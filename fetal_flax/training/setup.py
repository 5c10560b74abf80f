"""What is settled before a run's first step: data, split, weights, programs."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fetal_flax import checkpoints
from fetal_flax._util.cache_folder import cache_folder
from fetal_flax.checkpoints import Description
from fetal_flax.config import ModelConfig, TrainConfig, to_dict
from fetal_flax.conversion.encoder_weights import load_encoder
from fetal_flax.data import splits
from fetal_flax.data.batch import Batch, BatchRecipe, DeviceDataset
from fetal_flax.data.class_balance import foreground_pixels
from fetal_flax.data.datasets import Dataset, open_dataset
from fetal_flax.data.device_loader import device_foreground_pixels, load_device_dataset
from fetal_flax.data.samples import steps_per_epoch
from fetal_flax.errors import InputError
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables
from fetal_flax.training.compile import (
    BackgroundCompilation,
    Programs,
    compile_train_chunk,
    create_programs,
)
from fetal_flax.training.sharding import check_batch_size, create_mesh, replicate, replicated
from fetal_flax.training.step import Metrics, TrainState


@dataclasses.dataclass(frozen=True)
class Setup:
    """What never changes in a run."""

    config: TrainConfig
    dataset: Dataset
    split: splits.Split
    pos_weight: float
    mesh: jax.sharding.Mesh
    programs: Programs
    compiled_chunk: BackgroundCompilation
    """`programs.train_chunk` for `steps_per_call` steps."""
    steps_per_epoch: int
    steps_per_call: int
    """Training steps of a call, at most."""
    variables: Variables
    """What the run begins with."""
    device_dataset: DeviceDataset | None
    """The images, where they are on the devices."""

    @functools.cached_property
    def pos_weight_on_devices(self) -> jax.Array:
        """`pos_weight` as the steps take it."""
        return replicate(np.float32(self.pos_weight), self.mesh)

    def train_chunk(
        self, state: TrainState, items: Batch | BatchRecipe
    ) -> tuple[TrainState, Metrics]:
        """Does the steps of a call; in an epoch's first and last they may be fewer than usual."""
        whole = len(jax.tree.leaves(items)[0]) == self.steps_per_call
        chunk = self.compiled_chunk if whole else self.programs.train_chunk
        return chunk(state, self.pos_weight_on_devices, self.device_dataset, items)

    def description(self, progress: dict[str, Any]) -> Description:
        """Returns what the run's checkpoints say of themselves."""
        return Description(
            kind="network",
            model=self.config.model,
            image_size=self.config.data.image_size,
            config=to_dict(self.config) | {"pos_weight": self.pos_weight},
            progress=progress,
        )


def prepare(config: TrainConfig) -> Setup:
    """Loads weights and data, splits, and builds the steps; nothing is written but caches.

    Raises:
        InputError: A setting, a weight file or the data set can't be used.
    """
    mesh = create_mesh()
    check_batch_size(config.schedule.batch_size, mesh)
    cache_dir = cache_folder(config.data.cache_dir)
    initial = _initial_variables(config, cache_dir)
    dataset = open_dataset(config.data, config.seed)
    split = splits.split(dataset.names, dataset.examinations, **split_method(config))
    epoch_steps = steps_per_epoch(len(split.train), config.schedule.batch_size)
    on_devices = _data_on_devices(config, mesh, len(dataset))
    call_steps = _steps_per_call(config, mesh, epoch_steps, on_devices=on_devices)
    programs = create_programs(config, mesh, steps_per_epoch=epoch_steps)
    # All that follows happens while a thread compiles.
    records = len(dataset) if on_devices else None
    compiled = compile_train_chunk(config, programs, records=records, steps=call_steps)
    device_dataset = None
    if on_devices:
        device_dataset = load_device_dataset(
            dataset, config.data.image_size, replicated(mesh), soft_masks=config.data.soft_masks
        )
    pos_weight = config.loss.pos_weight
    if pos_weight == "auto":
        # Of whole pixels: soft masks and hard ones are weighted alike.
        pixels = (
            foreground_pixels(dataset, config.data.image_size)
            if device_dataset is None or config.data.soft_masks
            else device_foreground_pixels(device_dataset)
        )
        foreground = pixels[list(split.train)].mean() / math.prod(config.data.image_size)
        pos_weight = (1 - foreground) / foreground
    return Setup(
        config=config,
        dataset=dataset,
        split=split,
        pos_weight=float(pos_weight),
        mesh=mesh,
        programs=programs,
        compiled_chunk=compiled,
        steps_per_epoch=epoch_steps,
        steps_per_call=call_steps,
        variables=initial(),
        device_dataset=device_dataset,
    )


def _initial_variables(config: TrainConfig, cache_dir: Path) -> Callable[[], Variables]:
    """Reads what the run begins with, and returns what makes variables of it.

    Raises:
        InputError: `init` or the encoder's weights can't be read, or are of another network.
    """
    network = encoder = None
    if config.init == "none":
        encoder = load_encoder(config.encoder.weights, config.model, cache_dir)
    else:
        network = _load_network(config)

    def initial() -> Variables:
        variables = network or functional.init(config.model, config.seed)
        if encoder is not None:
            variables = Variables(
                variables.params | encoder.params, variables.batch_stats | encoder.batch_stats
            )
        return _with_float16_encoder(variables) if config.encoder.float16 else variables

    return initial


def _load_network(config: TrainConfig) -> Variables:
    """Returns the network that `init` names."""
    variables, description = checkpoints.load_checkpoint(Path(os.path.expanduser(config.init)))
    wanted, found = functional.shapes(config.model), functional.shapes(description.model)
    if jax.tree.map(lambda a: a.shape, wanted) != jax.tree.map(lambda a: a.shape, found):
        raise InputError(
            f"setting init is {config.init}, which holds a {description.model.title}, not the "
            f"{config.model.title} that is to be trained: set model to the settings of its "
            "config.json"
        )
    return variables


def _with_float16_encoder(variables: Variables) -> Variables:
    """Returns variables whose encoder has values that float16 holds."""

    def rounded(name: str, array: jax.Array) -> jax.Array:
        if not name.startswith(functional.ENCODER):
            return array
        return jax.device_put(np.asarray(array).astype(np.float16).astype(np.float32))

    return Variables(
        *({name: rounded(name, array) for name, array in arrays.items()} for arrays in variables)
    )


def describe(setup: Setup) -> str:
    """Returns the run in three lines: network, data, devices."""
    config, split = setup.config, setup.split
    encoder = "trainable" if config.encoder.trainable else "frozen"
    weights = {"none": "random weights"}.get(config.encoder.weights, config.encoder.weights)
    weights = weights if config.init == "none" else config.init
    of_encoder = "" if config.model.name == "unet" else f", {encoder} encoder from {weights}"
    examinations = [
        len({setup.dataset.examinations[i] for i in side})
        for side in (split.train, split.validation)
    ]
    device = jax.devices()[0]
    proposed = config.model.name == "mobilenet_aspp_se_unet"
    variant = f" ({config.model.variant})" if proposed else ""
    return (
        f"{config.model.name}{variant}{of_encoder}\n"
        f"{len(split.train)} training images of {examinations[0]} examinations, "
        f"{len(split.validation)} validation images of {examinations[1]}, "
        f"pos_weight {setup.pos_weight:.3f}, batches by the "
        f"{'host' if setup.device_dataset is None else 'devices'}\n"
        f"{setup.mesh.size} x {device.device_kind} ({device.platform}), "
        f"{arithmetic(config.model, device.platform)}, batch {config.schedule.batch_size}, "
        f"{setup.steps_per_epoch} steps per epoch"
    )


def arithmetic(model: ModelConfig, platform: str) -> str:
    """Returns what a network's convolutions compute in on a platform, in words."""
    rounded = platform == "gpu" and model.matmul_precision == "default"
    if model.dtype == "float32" and rounded:
        return "float32 with products in TF32 where the GPU has it"
    return model.dtype


def _data_on_devices(config: TrainConfig, mesh: jax.sharding.Mesh, records: int) -> bool:
    """Returns whether the devices hold the data set and prepare the batches."""
    if config.data.backend is not None:
        return config.data.backend == "device"
    # An image and a mask of each record, a byte a pixel.
    return fits_accelerator(mesh.local_devices[0], 2 * records * math.prod(config.data.image_size))


def fits_accelerator(device: Any, data_bytes: int) -> bool:
    """Returns whether a device is no CPU and a quarter of its memory holds so many bytes."""
    if device.platform == "cpu":
        return False
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    return data_bytes <= memory / 4


def _steps_per_call(
    config: TrainConfig, mesh: jax.sharding.Mesh, epoch_steps: int, *, on_devices: bool
) -> int:
    """Returns how many training steps a call does, at most."""
    default = epoch_steps if on_devices else 1
    if mesh.devices.flat[0].platform == "cpu":
        # In a call's second step, the memory of the first is there: the system need not clear it.
        default = 2
    return min(config.data.steps_per_dispatch or default, epoch_steps)


def split_method(config: TrainConfig) -> dict[str, Any]:
    """Returns the settings that decide which image is on which side."""
    return {
        "seed": config.seed,
        "validation_fraction": config.data.validation_fraction,
        "folds": config.data.folds,
        "fold": config.data.fold,
    }
