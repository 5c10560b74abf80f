"""Checkpoints: arrays by name, and a description of what they are.

`load` is the way to every network, whatever holds it: a training run, a conversion, or the package.
"""

from fetal_flax.checkpoints.description import DamagedError, Description, Kind
from fetal_flax.checkpoints.store import (
    DAMAGED,
    PER_EPOCH,
    TrainingCheckpoints,
    exists,
    load,
    load_encoder,
    locate,
    save,
)

__all__ = [
    "DAMAGED",
    "PER_EPOCH",
    "DamagedError",
    "Description",
    "Kind",
    "TrainingCheckpoints",
    "exists",
    "load",
    "load_encoder",
    "locate",
    "save",
]
