"""A network and a run small enough to train in seconds, and what the run leaves."""

import contextlib
import csv
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from flax import nnx

from fetal_flax import checkpoints
from fetal_flax.config import ModelConfig
from fetal_flax.models import functional
from fetal_flax.models.blocks import ConvNorm
from fetal_flax.models.init import HostRngs
from fetal_flax.models.interface import as_input, as_logits
from fetal_flax.models.layers import Conv
from fetal_flax.reporting import pictures
from fetal_flax.training import setup
from fetal_flax.training.run import train

TIMINGS = {"seconds", "images_per_second", "waiting"}


class TinyEncoder(nnx.Module):
    """Gives one map of features, of the image's size."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.conv = ConvNorm(config.in_channels, config.base_width, 3, rngs=rngs)

    def __call__(self, x, *, train: bool | None = None):
        return (nnx.relu(self.conv(x, train=train)),)


class TinyNetwork(nnx.Module):
    """A convolution each as encoder, decoder and head: all that steps and runs tell apart."""

    divisor = 1

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = TinyEncoder(config, rngs=rngs)
        self.bottleneck = ConvNorm(config.base_width, config.base_width, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5 if config.name == "mobilenet_aspp_se_unet" else 0.0)
        self.head = Conv(config.base_width, 1, 1, bias=True, rngs=rngs)

    def __call__(self, images, *, train=None, train_encoder=None, dropout_key=None, features=None):
        x = as_input(images, self.config, self.divisor)
        (x,) = features or self.encoder(x, train=train_encoder)
        x = nnx.relu(self.bottleneck(x, train=train))
        rngs = None if dropout_key is None else nnx.Rngs(dropout=dropout_key)
        return as_logits(self.head(self.dropout(x, deterministic=not train, rngs=rngs)))


@contextlib.contextmanager
def _tiny_networks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        structure = functools.lru_cache(functional._structure.__wrapped__)
        patch.setattr(functional, "_structure", structure)

        def create(config: ModelConfig, seed: int | None) -> nnx.Module:
            return TinyNetwork(config, rngs=cast(nnx.Rngs, HostRngs(seed)))

        patch.setattr(functional, "create", create)
        yield


@pytest.fixture(scope="session")
def tiny_networks() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Makes a context in which every network is a tiny one, for what outlives a test."""
    return _tiny_networks


@pytest.fixture
def tiny_network() -> Iterator[None]:
    """Every network is a tiny one: to trace and compile a U-Net's step takes ten times as long."""
    with _tiny_networks():
        yield


@pytest.fixture
def never_trained(monkeypatch) -> None:
    """For runs that are prepared and never trained, whose step nobody has to compile."""
    monkeypatch.setattr(setup, "compile_train_chunk", lambda *arguments, **keywords: None)


@pytest.fixture(scope="session")
def finished(small_config, tmp_path_factory, compiled_quickly, tiny_networks) -> Path:
    """The workdir of an undisturbed run of two epochs of a tiny network."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    with compiled_quickly(), tiny_networks():
        train(small_config(), workdir, profile=True)
    return workdir


@pytest.fixture(scope="module", autouse=True)
def compiled_as_finished(quick_compilation) -> None:
    """Half the time; reliability/faults.py has XLA optimise, and compares bits, too."""


@pytest.fixture(autouse=True)
def pictures_not_drawn(monkeypatch) -> None:
    """Matplotlib takes a tiny run longer than its epochs; `finished`, made before, has pictures."""
    for name in ("training_curves", "overlay_sheet"):
        monkeypatch.setattr(pictures, name, lambda path, contents: Path(path).touch())


@pytest.fixture(scope="session")
def read_rows() -> Callable[[Path], list[dict[str, str]]]:
    """Reads a run's metrics, but for times."""

    def read(workdir: Path) -> list[dict[str, str]]:
        with (workdir / "metrics.csv").open(newline="") as file:
            return [
                {name: value for name, value in row.items() if name not in TIMINGS}
                for row in csv.DictReader(file)
            ]

    return read


@pytest.fixture(scope="session")
def same_state() -> Callable[[Path, Path], bool]:
    """Compares the best networks of two runs bit by bit."""

    def same(workdir: Path, other: Path) -> bool:
        loaded = [checkpoints.load_checkpoint(path)[0] for path in (workdir, other)]
        return all(
            np.array_equal(ours[name], theirs[name])
            for ours, theirs in zip(*loaded, strict=True)
            for name in theirs
        )

    return same
