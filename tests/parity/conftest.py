from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

from fetal_flax.data.pipeline import Batch


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[None]:
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def make_batches() -> Callable[..., list[Batch]]:
    """Noise with a bright rectangle per image, and the rectangle."""

    def make(images: int, height: int, width: int, *, channels: int = 1, count: int = 1):
        rng = np.random.default_rng(0)
        batches = []
        for _ in range(count):
            shape = (images, height, width, channels)
            image = rng.integers(0, 120, shape, np.uint8)
            mask = np.zeros((images, height, width, 1), np.uint8)
            for row in mask:
                top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
                row[top : top + height // 2, left : left + width // 2] = 1
            records = np.arange(images, dtype=np.int32)
            batches.append(Batch(image + 120 * mask, mask, np.ones(images, bool), records))
        return batches

    return make
