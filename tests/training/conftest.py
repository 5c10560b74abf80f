"""A run small enough to train in seconds, and what it leaves."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fetal_flax import checkpoints
from fetal_flax.reporting import pictures
from fetal_flax.training import setup
from fetal_flax.training.run import train

TIMINGS = {"seconds", "images_per_second", "waiting"}


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
