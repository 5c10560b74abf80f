"""The machine's limits: the rate of a large matrix product and of a large copy, and its memory."""

import dataclasses
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fetal_flax._util.machine import available_cpus

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


def measure_machine(dtype: jnp.dtype, repeats: int) -> Machine:
    """Measures the machine's limits on one device.

    Args:
        dtype: Of the matrix product.
        repeats: Timed repetitions of each; the median counts.
    """
    on_cpu = jax.default_backend() == "cpu"
    side = _PRODUCT_SIDE_ON_CPU if on_cpu else _PRODUCT_SIDE
    matrix = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    # The result differs from the argument, so that the copy can't be left out, and takes its place:
    # in memory that is asked for anew, a CPU's system would be timed, clearing it.
    line = jnp.ones(_COPY_BYTES // 4, jnp.float32)
    copy = jax.jit(lambda a: a + 1, donate_argnums=0)
    product_seconds = repeat(product, (matrix,), lambda _: (matrix,), repeats)
    copy_seconds = repeat(copy, (line,), lambda result: (result,), repeats)
    return Machine(
        device=device_name(),
        devices=jax.device_count(),
        jax=jax.__version__,
        python=platform.python_version(),
        product_flops=2 * side**3 / statistics.median(product_seconds),
        copy_bytes=2 * line.nbytes / statistics.median(copy_seconds),
    )


def repeat(
    call: Callable[..., Any],
    arguments: tuple[Any, ...],
    following: Callable[[Any], tuple[Any, ...]],
    repeats: int,
) -> list[float]:
    """Times a computation, each repetition up to the end of its last result.

    Args:
        call: The computation.
        arguments: Of the first call.
        following: Returns a call's arguments, given the results of the one before.
        repeats: How many are timed, behind one that warms up.

    Returns:
        The seconds of each.
    """
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


def peak_bytes() -> int | None:
    """Returns the peak of the device's memory where it says so, else of the process's.

    None on Windows, which tells neither.
    """
    statistics_of_device = jax.devices()[0].memory_stats()
    if statistics_of_device and "peak_bytes_in_use" in statistics_of_device:
        return statistics_of_device["peak_bytes_in_use"]
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
