"""Runs to be trained by name: files whose `config()` gives every setting, such as configs/hc18.py.

A checkout has them in configs/; a wheel carries the same files in fetal_flax/_presets.
"""

import importlib.util
import traceback
from collections.abc import Callable
from pathlib import Path

from fetal_flax.config import TrainConfig
from fetal_flax.errors import InputError, printable

DEFAULT = "phantom"
"""Needs no download, and is done in minutes on a CPU."""
_IN_WHEEL = Path(__file__).with_name("_presets")
FOLDER = _IN_WHEEL if _IN_WHEEL.is_dir() else Path(__file__).parents[1] / "configs"


def names() -> tuple[str, ...]:
    """Returns the names of the presets, in order."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.py")))


def load(name: str) -> TrainConfig:
    """Returns the settings of a preset.

    Raises:
        InputError: There is no such preset.
    """
    if name not in names():
        raise InputError(
            f"there is no preset {printable(name)}: choose one of {', '.join(names())}, or give "
            "your own file as --config FILE"
        )
    return load_file(FOLDER / f"{name}.py")


def load_file(path: Path) -> TrainConfig:
    """Returns what the `config()` of a file such as `configs/hc18.py` gives.

    Raises:
        InputError: There is no such file, or it has no `config()` that returns a TrainConfig.
    """
    if not path.is_file():
        raise InputError(f"--config {path} is no file: give one such as configs/hc18.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"--config {path} is no Python file: give one such as configs/hc18.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        make: Callable[[], object] | None = getattr(module, "config", None)
        config = make() if callable(make) else None
    except InputError:
        raise
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f" in line {line}" if line else ""
        reason = printable(f"{type(error).__name__}: {error}")
        raise InputError(f"--config {path} fails{where} ({reason}): correct it") from error
    if not isinstance(config, TrainConfig):
        raise InputError(f"--config {path} has no function config() that returns a TrainConfig")
    return config
