"""The settings of `fetal-flax parity`."""

import dataclasses
from typing import Literal

from fetal_flax.config import LossConfig, OptimizerConfig
from fetal_flax.errors import InputError

Precision = Literal["float32", "float64"]


@dataclasses.dataclass(frozen=True)
class ParitySettings:
    """What is compared, and how."""

    precisions: tuple[Precision, ...] = ("float64", "float32")
    """What both sides compute in; float64 shows which differences are rounding."""
    image_size: tuple[int, int] = (256, 256)
    """Height and width that the networks see, in pixels."""
    batch_size: int = 4
    """Images per batch."""
    batches: int = 2
    """Batches that the optimizer steps take in turn; all else is compared on the first."""
    steps: int = 10
    """Optimizer steps to train on both sides; 0 for none."""
    train_encoder: bool = False
    """Whether the encoder learns."""
    frozen_batch_norm: Literal["running", "batch"] = "running"
    """What a frozen encoder's batch norms do in training; `batch` is the published freeze, which
    lets the statistics drift."""
    randomise_norms: bool = False
    """Draw every norm's scale, shift, mean and variance anew, on both sides alike, so that none
    can pass for another."""
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    """Its `auto` pos_weight is taken from the masks at hand."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """Adam; the encoder, if it learns, has a tenth of the rate."""

    def __post_init__(self) -> None:
        for field, least in (("batch_size", 1), ("batches", 1), ("steps", 0)):
            if getattr(self, field) < least:
                raise InputError(f"setting {field} must be at least {least}")
        if not self.precisions:
            raise InputError("setting precisions must name float32, float64 or both")
