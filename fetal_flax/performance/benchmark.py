"""`fetal-flax benchmark`: what this machine does with a network, and how near to its limits.

Inference and training steps are timed with everything on the device, without loading images. The
limits are measured too: the rate of a large matrix product and of a large copy. A computation of
so many operations, on so many bytes of arguments and results, can't take less than either rate
allows (the roofline of Williams, Waterman & Patterson 2009, CACM 52(4)). Operations are those of
the network's definition, every tap of every kernel counted.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fetal_flax.checkpoints import Checkpoint, Description, load_checkpoint
from fetal_flax.config import (
    DataConfig,
    EncoderConfig,
    ModelConfig,
    ScheduleConfig,
    TrainConfig,
)
from fetal_flax.data.batch import Batch
from fetal_flax.errors import InputError
from fetal_flax.inference.segmenter import Segmenter
from fetal_flax.models import functional
from fetal_flax.models.complexity import summarize
from fetal_flax.models.functional import Variables
from fetal_flax.performance.machine import Machine, measure_machine, peak_bytes, repeat
from fetal_flax.training.compile import create_programs, create_state
from fetal_flax.training.sharding import (
    batch_sharding,
    check_batch_size,
    check_devices,
    create_mesh,
)


@dataclasses.dataclass(frozen=True)
class Timing:
    """One computation."""

    name: str
    batch_size: int
    devices: int
    """How many of the machine's work on it: one on inference, all on training."""
    seconds: float
    """Median of the repetitions."""
    quartiles: tuple[float, float]
    images_per_second: float
    compile_seconds: float
    temporaries_bytes: int | None
    """Memory on each device besides arguments and results, as XLA plans it."""
    roofline_share: float
    """The time that the machine's limits allow, as a share of the time that was taken."""


@dataclasses.dataclass(frozen=True)
class Report:
    """All that `fetal-flax benchmark` measures."""

    machine: Machine
    network: str
    image_size: tuple[int, int]
    timings: tuple[Timing, ...]
    peak_bytes: int | None
    """Of the device's memory where it says so, else of the process's; None on Windows."""


def network(
    model: ModelConfig, checkpoint: Path | None, image_size: tuple[int, int] | None
) -> tuple[ModelConfig, Variables, tuple[int, int]]:
    """Returns the network to measure, its variables, and the size of the images.

    Args:
        model: The network where there is no checkpoint; its variables are random.
        checkpoint: Training workdir, converted directory, or a shipped network's name.
        image_size: Height and width; None takes the checkpoint's.

    Raises:
        InputError: The checkpoint can't be loaded, or is given beside settings of the model.
    """
    if checkpoint is None:
        return model, functional.init(model, 0), image_size or DataConfig.image_size
    if model != ModelConfig():
        raise InputError("--checkpoint tells which network to measure: leave --model.* out")
    variables, description = load_checkpoint(checkpoint)
    return description.model, variables, image_size or description.image_size


def benchmark(
    model: ModelConfig,
    variables: Variables,
    image_size: tuple[int, int],
    *,
    inference_batches: Sequence[int],
    training_batch: int,
    repeats: int,
) -> Report:
    """Measures inference and training of a network, encoder frozen.

    Args:
        model: The network.
        variables: Its parameters and batch statistics.
        image_size: Height and width of the images.
        inference_batches: Images per call.
        training_batch: Images per step, over all devices together.
        repeats: Timed repetitions of each.

    Raises:
        InputError: The network doesn't take images of this size, a count is less than 1, or the
            devices can't be used.
    """
    counts = {
        "inference-batches": inference_batches,
        "training-batch": [training_batch],
        "repeats": [repeats],
    }
    for flag, given in counts.items():
        if min(given, default=1) < 1:
            raise InputError(f"--{flag} must be at least 1, not {min(given)}")
    check_devices(model)
    parts = summarize(model, encoder_trainable=False, image_size=image_size)
    forward = 2 * parts.total.macs
    # Backward computes two products for each one that learns: by the input and by the kernel.
    learning = 2 * sum(part.macs for part in parts.parts if part.trainable)
    machine = measure_machine(jnp.dtype(model.dtype), repeats)
    timings = [
        _measure(_inference(model, variables, image_size, batch), batch, forward, machine, repeats)
        for batch in inference_batches
    ]
    # Last, for a step consumes the variables.
    training = _training(model, variables, image_size, training_batch)
    timings.append(_measure(training, training_batch, forward + 2 * learning, machine, repeats))
    return Report(machine, model.title, image_size, tuple(timings), peak_bytes())


class _Computation(NamedTuple):
    """What is timed: a function, its first arguments, and the next ones from its results."""

    name: str
    devices: int
    function: jax.stages.Wrapped
    arguments: tuple[Any, ...]
    following: Callable[[Any], tuple[Any, ...]]


def _inference(
    model: ModelConfig, variables: Variables, image_size: tuple[int, int], batch_size: int
) -> _Computation:
    checkpoint = Checkpoint(variables, Description("network", model, image_size))
    segmenter = Segmenter(checkpoint, batch_size=batch_size)
    images = jnp.zeros((batch_size, *image_size, model.in_channels), jnp.uint8)
    function, arguments = segmenter.call(images)
    return _Computation("inference", 1, function, arguments, lambda _: arguments)


def _training(
    model: ModelConfig, variables: Variables, image_size: tuple[int, int], batch_size: int
) -> _Computation:
    mesh = create_mesh()
    check_batch_size(batch_size, mesh)
    config = TrainConfig(
        model=model,
        encoder=EncoderConfig(weights="none"),
        data=DataConfig(image_size=image_size),
        schedule=ScheduleConfig(batch_size=batch_size),
    )
    state = create_state(config, variables, mesh)
    rng = np.random.default_rng(0)
    batch = jax.device_put(
        Batch(
            image=rng.integers(0, 256, (batch_size, *image_size, model.in_channels), np.uint8),
            mask=rng.integers(0, 2, (batch_size, *image_size, 1), np.uint8),
            valid=np.ones(batch_size, bool),
            index=np.arange(batch_size, dtype=np.int32),
        ),
        batch_sharding(mesh),
    )
    step = create_programs(config, mesh).train_step
    # A step consumes its state.
    return _Computation(
        "training", mesh.size, step, (state, 1.0, batch), lambda results: (results[0], 1.0, batch)
    )


def _measure(
    computation: _Computation, batch_size: int, flops: int, machine: Machine, repeats: int
) -> Timing:
    """Compiles and times a computation of `flops` for each image."""
    name, devices, function, arguments, following = computation
    start = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    compile_seconds = time.perf_counter() - start
    seconds = repeat(compiled, arguments, following, repeats)
    median = statistics.median(seconds)
    low, high = np.percentile(seconds, (25, 75))
    memory = compiled.memory_analysis()
    least = flops * batch_size / devices / machine.product_flops
    if memory:
        moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
        least = max(least, moved / machine.copy_bytes)
    return Timing(
        name,
        batch_size,
        devices,
        median,
        (float(low), float(high)),
        batch_size / median,
        compile_seconds,
        memory.temp_size_in_bytes if memory else None,
        least / median,
    )
