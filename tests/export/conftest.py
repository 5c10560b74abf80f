"""Networks, images and programs that the tests of exported files share."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from fetal_flax.checkpoints import Checkpoint, Description
from fetal_flax.config import ModelConfig
from fetal_flax.errors import InputError
from fetal_flax.export import web
from fetal_flax.models import functional


def missing(reason: str) -> None:
    """Skips the test; CI has to have everything."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def program() -> Callable[..., str]:
    """Returns the path of the first of the programs that is installed."""

    def find(*names: str) -> str:
        found = next(filter(None, map(shutil.which, names)), None)
        if found is None:
            missing(f"no {' or '.join(names)} on PATH: install one to test what runs there")
        return str(found)

    return find


@pytest.fixture(scope="session")
def onnxruntime_web() -> web.BrowserRuntime:
    """The npm package that FETAL_FLAX_ONNXRUNTIME_WEB names, or what npm fetches."""
    given = os.environ.get("FETAL_FLAX_ONNXRUNTIME_WEB")
    try:
        return web.browser_runtime(Path(given) if given else None)
    except InputError as error:
        missing(str(error))
        raise


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
