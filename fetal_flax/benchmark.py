"""`fetal-flax benchmark`: what this machine does with a network, and how near to its limits.

Inference and training steps are timed with everything on the device, without loading images. The
limits are measured too: the rate of a large matrix product and of a large copy. A computation of
so many operations, on so many bytes of arguments and results, can't take less than either rate
allows (the roofline of Williams, Waterman & Patterson 2009, CACM 52(4)). Operations are those of
the network's definition, every tap of every kernel counted.
"""

import dataclasses
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from fetal_flax._util import console
from fetal_flax._util.machine import available_cpus
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
from fetal_flax.training.compile import create_programs, create_state
from fetal_flax.training.sharding import batch_sharding, check_batch_size, create_mesh

_PRODUCT_SIDE, _PRODUCT_SIDE_ON_CPU = 8192, 2048
_COPY_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class Machine:
    """What was measured on, and its limits."""

    device: str
    devices: int
    jax: str
    python: str
    product_flops: float
    """Floating-point operations per second of a matrix product in the network's dtype."""
    copy_bytes: float
    """Bytes per second of a copy, read and written."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """One computation."""

    name: str
    batch_size: int
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
    peak_bytes: int
    """Of the device's memory where it says so, else of the process's."""


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
        InputError: The network doesn't take images of this size.
    """
    parts = summarize(model, encoder_trainable=False, image_size=image_size)
    forward = 2 * parts.total.macs
    # Backward computes two products for each one that learns: by the input and by the kernel.
    learning = 2 * sum(part.macs for part in parts.parts if part.trainable)
    machine = _machine(model, repeats)
    timings = [
        _measure(_inference(model, variables, image_size, batch), batch, forward, machine, repeats)
        for batch in inference_batches
    ]
    # Last, for a step consumes the variables.
    training = _training(model, variables, image_size, training_batch)
    timings.append(_measure(training, training_batch, forward + 2 * learning, machine, repeats))
    return Report(machine, model.title, image_size, tuple(timings), _peak_bytes())


def render(report: Report) -> rich.console.Group:
    """Returns the report for `rich` to print."""
    machine = report.machine
    height, width = report.image_size
    table = console.table(
        ("", "batch", "ms", "quartiles", "images/s", "compiling", "MB", "roofline")
    )
    for timing in report.timings:
        low, high = (1e3 * second for second in timing.quartiles)
        temporaries = timing.temporaries_bytes
        table.add_row(
            timing.name,
            str(timing.batch_size),
            f"{1e3 * timing.seconds:.1f}",
            f"{low:.0f}–{high:.0f}",
            f"{timing.images_per_second:.1f}",
            f"{timing.compile_seconds:.1f} s",
            "" if temporaries is None else f"{temporaries / 1e6:.0f}",
            f"{timing.roofline_share:.0%}",
        )
    return rich.console.Group(
        f"{report.network}, {height}×{width}, on {machine.devices} × {machine.device}; "
        f"jax {machine.jax}, Python {machine.python}",
        f"matrix product {machine.product_flops / 1e9:,.0f} GFLOP/s, copy "
        f"{machine.copy_bytes / 1e9:,.1f} GB/s; peak memory {report.peak_bytes / 1e6:,.0f} MB",
        table,
        "MB: temporaries on each device, XLA's plan. Roofline: the least time that the network's "
        "operations need at the rates above, as a share of the time taken.",
    )


class _Computation(NamedTuple):
    """What is timed: a function, its first arguments, and the next ones from its results."""

    name: str
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
    return _Computation("inference", function, arguments, lambda _: arguments)


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
        "training", step, (state, 1.0, batch), lambda results: (results[0], 1.0, batch)
    )


def _machine(model: ModelConfig, repeats: int) -> Machine:
    """Measures the machine's limits on one device."""
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.dtype(model.dtype)
    side = _PRODUCT_SIDE_ON_CPU if on_cpu else _PRODUCT_SIDE
    matrix = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    # The result differs from the argument, so that the copy can't be left out, and takes its place:
    # in memory that is asked for anew, a CPU's system would be timed, clearing it.
    line = jnp.ones(_COPY_BYTES // 4, jnp.float32)
    copy = jax.jit(lambda a: a + 1, donate_argnums=0)
    product_seconds = _repeat(product, (matrix,), lambda _: (matrix,), repeats)
    copy_seconds = _repeat(copy, (line,), lambda result: (result,), repeats)
    return Machine(
        device=device_name(),
        devices=jax.device_count(),
        jax=jax.__version__,
        python=platform.python_version(),
        product_flops=2 * side**3 / statistics.median(product_seconds),
        copy_bytes=2 * line.nbytes / statistics.median(copy_seconds),
    )


def _measure(
    computation: _Computation, batch_size: int, flops: int, machine: Machine, repeats: int
) -> Timing:
    """Compiles and times a computation of `flops` for each image."""
    name, function, arguments, following = computation
    start = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    compile_seconds = time.perf_counter() - start
    seconds = _repeat(compiled, arguments, following, repeats)
    median = statistics.median(seconds)
    low, high = np.percentile(seconds, (25, 75))
    memory = compiled.memory_analysis()
    least = flops * batch_size / machine.devices / machine.product_flops
    if memory:
        moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
        least = max(least, moved / machine.copy_bytes)
    return Timing(
        name,
        batch_size,
        median,
        (float(low), float(high)),
        batch_size / median,
        compile_seconds,
        memory.temp_size_in_bytes if memory else None,
        least / median,
    )


def _repeat(
    call: Callable[..., Any],
    arguments: tuple[Any, ...],
    following: Callable[[Any], tuple[Any, ...]],
    repeats: int,
) -> list[float]:
    """Returns the seconds of each repetition, behind one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        results = jax.block_until_ready(call(*arguments))
        seconds.append(time.perf_counter() - start)
        arguments = following(results)
    return seconds[1:]


def device_name() -> str:
    """Returns the accelerator's name, or the processor's with the number of its cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cores = f"{available_cpus()} cores"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.processor()}, {cores}"
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {cores}" if names else f"{platform.machine()}, {cores}"


def _peak_bytes() -> int:
    statistics_of_device = jax.devices()[0].memory_stats()
    if statistics_of_device and "peak_bytes_in_use" in statistics_of_device:
        return statistics_of_device["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
