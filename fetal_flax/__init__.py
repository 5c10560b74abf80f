"""Fetal-head segmentation and head circumference on HC18 in JAX/Flax.

    import fetal_flax as ff

    image, pixel_size_mm = ff.read_image("scan.dcm")
    result = ff.load("runs/hc18").measure(image, pixel_size_mm)
    print(result.hc_mm, result.ga_weeks, result.flags)

This import costs nothing: a name is imported when it is first used (PEP 562). docs/python.md shows
all of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fetal_flax import config, export, models
    from fetal_flax.checkpoints import (
        Checkpoint,
        Description,
        load_checkpoint,
        save_checkpoint,
    )
    from fetal_flax.checkpoints.shipped import list_networks
    from fetal_flax.config import ModelConfig, TrainConfig
    from fetal_flax.conversion.convert import from_torch, to_torch
    from fetal_flax.data.phantoms import make_phantom
    from fetal_flax.errors import InputError
    from fetal_flax.evaluation.evaluate import evaluate
    from fetal_flax.inference.assessment import Measurement
    from fetal_flax.inference.segmenter import Segmenter, load
    from fetal_flax.inference.sources import read_image
    from fetal_flax.models.functional import (
        Variables,
        apply,
        apply_train,
        init,
        merge,
        subtree,
        variables_of,
    )
    from fetal_flax.models.registry import create_model
    from fetal_flax.training import losses
    from fetal_flax.training import optimizer as optimizers
    from fetal_flax.training import schedule as schedules
    from fetal_flax.training.run import train

    __version__: str

_HOMES = {
    # To measure.
    "load": "inference.segmenter",
    "Segmenter": "inference.segmenter",
    "Measurement": "inference.assessment",
    "read_image": "inference.sources",
    "list_networks": "checkpoints.shipped",
    "make_phantom": "data.phantoms",
    "InputError": "errors",
    # To work in JAX.
    "create_model": "models.registry",
    "apply": "models.functional",
    "apply_train": "models.functional",
    "init": "models.functional",
    "subtree": "models.functional",
    "merge": "models.functional",
    "variables_of": "models.functional",
    "Variables": "models.functional",
    "ModelConfig": "config",
    # Checkpoints.
    "Checkpoint": "checkpoints",
    "Description": "checkpoints",
    "load_checkpoint": "checkpoints",
    "save_checkpoint": "checkpoints",
    "from_torch": "conversion.convert",
    "to_torch": "conversion.convert",
    # Commands.
    "TrainConfig": "config",
    "train": "training.run",
    "evaluate": "evaluation.evaluate",
}
_MODULES = {
    "config": "config",
    "export": "export",
    "losses": "training.losses",
    "models": "models",
    "optimizers": "training.optimizer",
    "schedules": "training.schedule",
}

__all__ = [
    "Checkpoint",
    "Description",
    "InputError",
    "Measurement",
    "ModelConfig",
    "Segmenter",
    "TrainConfig",
    "Variables",
    "__version__",
    "apply",
    "apply_train",
    "config",
    "create_model",
    "evaluate",
    "export",
    "from_torch",
    "init",
    "list_networks",
    "load",
    "load_checkpoint",
    "losses",
    "make_phantom",
    "merge",
    "models",
    "optimizers",
    "read_image",
    "save_checkpoint",
    "schedules",
    "subtree",
    "to_torch",
    "train",
    "variables_of",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"fetal_flax.{_HOMES[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"fetal_flax.{_MODULES[name]}")
    elif name == "__version__":
        from importlib.metadata import version

        value = version("fetal_flax")
    else:
        raise AttributeError(f"module 'fetal_flax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
