"""The rooms of the package, who may import whom, and what each room can do without."""

import ast
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fetal_flax"
EVERYWHERE = {"errors", "config", "config_rules", "_util", "__version__"}
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "config": set(),
    "config_rules": set(),
    "_util": set(),
    "presets": set(),
    "measurement": set(),
    "models": set(),
    "data": {"measurement"},
    "checkpoints": {"models"},
    "conversion": {"models", "checkpoints"},
    "reporting": {"measurement"},
    "inference": {"checkpoints", "models", "measurement", "data", "reporting"},
    "export": {"checkpoints", "data", "inference", "measurement", "models"},
    "summary": {"models"},
    "training": {
        *("data", "models", "measurement", "checkpoints", "conversion", "inference"),
        *("reporting", "summary"),
    },
    "evaluation": {"checkpoints", "data", "inference", "measurement", "reporting", "training"},
    "performance": {"checkpoints", "data", "models", "inference", "training"},
    "parity": {"checkpoints", "conversion", "data", "models", "training"},
}
"""What each room imports, besides `EVERYWHERE` and itself; the commands import them all."""
FREE = {"commands", "__init__", "__main__"}
"""Imports are weighed by the syntax, wherever in a file they stand."""


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            of_package = node.module == "fetal_flax"
            names = (
                [f"fetal_flax.{a.name}" for a in node.names] if of_package else [str(node.module)]
            )
        for name in names:
            parts = name.split(".")
            if parts[0] == "fetal_flax" and len(parts) > 1:
                yield parts[1]


def test_rooms_import_along_the_arrows():
    for path in PACKAGE.rglob("*.py"):
        own = room(path)
        if own not in FREE:
            strange = set(imported_rooms(path)) - ARROWS[own] - EVERYWHERE - {own}
            assert not strange, f"{path} imports {strange}"


def test_no_two_rooms_import_each_other():
    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        ahead = set(ARROWS[start])
        while ahead:
            found |= ahead
            ahead = set().union(*(ARROWS[name] for name in ahead)) - found
        return found

    for name in ARROWS:
        assert name not in reachable(name)


def test_every_arrow_is_used():
    """So that the table tells how it is, not how it was."""
    used: dict[str, set[str]] = {name: set() for name in ARROWS}
    for path in PACKAGE.rglob("*.py"):
        if room(path) not in FREE:
            used[room(path)] |= set(imported_rooms(path)) - EVERYWHERE - {room(path)}
    assert used == ARROWS


def importers(package: str) -> set[str]:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            if any(name.split(".")[0] == package for name in names):
                found.add(room(path))
    return found


def test_one_room_alone_knows_orbax_and_one_knows_pytorch():
    assert importers("orbax") == {"checkpoints"}
    assert importers("torch") == {"parity"}


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("fetal_flax.measurement.head", ("jax", "flax", "optax", "orbax", "tensorflow_datasets")),
        ("fetal_flax.measurement.quality", ("jax", "flax", "albumentations", "grain")),
        ("fetal_flax.measurement.surface", ("jax", "flax", "albumentations", "grain")),
        ("fetal_flax.training.step", ("grain", "tensorflow_datasets", "albumentations", "orbax")),
        ("fetal_flax.models.functional", ("cv2", "albumentations", "grain", "tensorflow_datasets")),
    ],
)
def test_a_room_does_without(module, without):
    """In a process of its own, in which these packages can't be imported."""
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in without)
    code = f"import sys; {blocked}import {module}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_the_way_from_file_to_gradient_is_as_documented():
    """docs/decisions.md lists it: at most twelve functions in five files."""
    text = (PACKAGE.parent / "docs" / "decisions.md").read_text()
    section = text.split("**From file to gradient**")[1].split("**`train_step`")[0]
    rows = re.findall(r"^\| `([\w/]+)\.py` \|.*\| (.*) \|$", section, re.MULTILINE)
    functions = [(file, name) for file, names in rows for name in re.findall(r"`(.*?)`", names)]
    assert len(functions) == 12
    assert len({file for file, _ in functions}) == 5
    for file, name in functions:
        module = importlib.import_module("fetal_flax." + file.replace("/", "."))
        function = functools.reduce(getattr, name.split("."), module)
        assert callable(function) and function.__module__ == module.__name__
