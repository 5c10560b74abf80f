"""Networks and images that the tests of exported files share."""

from collections.abc import Callable
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from fetal_flax.checkpoints import Checkpoint, Description
from fetal_flax.config import ModelConfig
from fetal_flax.models import functional


@pytest.fixture(scope="session")
def trained_like() -> Callable[..., Checkpoint]:
    """Makes a network whose norms do something, as after a training."""

    def make(config: ModelConfig, size: tuple[int, int]) -> Checkpoint:
        variables = functional.init(config, seed=0)
        rng = np.random.default_rng(0)

        def drawn(name: str, array: jax.Array) -> jax.Array:
            if array.ndim > 1 or name.endswith("kernel"):
                return array
            low, high = (0.5, 2.0) if name.endswith(("scale", "var")) else (-0.3, 0.3)
            return jax.device_put(rng.uniform(low, high, array.shape).astype(np.float32))

        noisy = (
            {name: drawn(name, array) for name, array in arrays.items()} for arrays in variables
        )
        return Checkpoint(functional.Variables(*noisy), Description("network", config, size))

    return make


@pytest.fixture(scope="session")
def bright_heads(tmp_path_factory) -> Path:
    """A folder of images of bright ellipses, of two sizes."""
    folder = tmp_path_factory.mktemp("heads")
    for index in range(6):
        height, width = (180, 240) if index % 2 else (150, 300)
        image = np.random.default_rng(index).integers(0, 90, (height, width), np.uint8)
        box = (width / 2, height / 2), (110 + 4 * index, 90), 20 * index
        cv2.imwrite(str(folder / f"{index}.png"), cv2.ellipse(image, box, 230, -1))
    return folder
