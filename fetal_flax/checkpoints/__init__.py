"""Checkpoints: arrays by name, and a description of what they are.

`load_checkpoint` is the way to every network, whatever holds it: a training run, a conversion, or
the package.
"""

from fetal_flax.checkpoints.description import Checkpoint, DamagedError, Description, Kind
from fetal_flax.checkpoints.store import (
    DAMAGED,
    PER_EPOCH,
    TrainingCheckpoints,
    exists,
    load_checkpoint,
    load_encoder,
    locate,
    save_checkpoint,
)

__all__ = [
    "DAMAGED",
    "PER_EPOCH",
    "Checkpoint",
    "DamagedError",
    "Description",
    "Kind",
    "TrainingCheckpoints",
    "exists",
    "load_checkpoint",
    "load_encoder",
    "locate",
    "save_checkpoint",
]
