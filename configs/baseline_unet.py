"""Baseline: the standard U-Net of base width 32 on HC18, from scratch.

    fetal-flax train baseline_unet

There is no encoder to load here, so it needs nothing but HC18.
"""

from fetal_flax.config import EncoderConfig, ModelConfig, TrainConfig


def config() -> TrainConfig:
    """Returns the run's settings."""
    return TrainConfig(
        name="baseline_unet",
        model=ModelConfig(name="unet"),
        encoder=EncoderConfig(weights="none"),
    )
