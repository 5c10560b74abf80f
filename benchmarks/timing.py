"""Timing calls side by side; what the benchmarks share."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

Key = TypeVar("Key", bound=Hashable)


def time_interleaved(
    calls: Mapping[Key, Callable[[], Any]],
    repeats: int,
    limit: float = float("inf"),
    *,
    warm: bool = False,
) -> dict[Key, list[float]]:
    """Returns every call's seconds, taken in turn, so that a busy machine disturbs all alike.

    A first round warms up and isn't counted. Results are waited for.

    Args:
        calls: What to time.
        repeats: Rounds.
        limit: Seconds after which, and three rounds, no further round begins.
        warm: Run each once, unmeasured, right before it is timed, so that it finds the caches and
            the memory as it leaves them, and not as another call did.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    start = time.perf_counter()
    for turn in range(repeats + 1):
        for key, call in calls.items():
            if warm:
                jax.block_until_ready(call())
            before = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                seconds[key].append(time.perf_counter() - before)
        if turn >= 3 and time.perf_counter() - start > limit:
            break
    return seconds


def median_with_quartiles(values: list[float], digits: int) -> str:
    """Returns the median with the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def normalised_max_difference(result: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference over the deviation, or over the size of a single number."""
    scale = expected.std() if expected.ndim else abs(expected)
    return float(np.abs(result - expected).max() / scale)
