"""Baseline: U-Net decoder on a MobileNetV2 encoder that goes on learning, on HC18.

    fetal-flax train baseline_mobilenet_unet

`--encoder.no-trainable` freezes the encoder.
"""

from fetal_flax.config import EncoderConfig, ModelConfig, TrainConfig


def config() -> TrainConfig:
    """Returns the run's settings."""
    return TrainConfig(
        name="baseline_mobilenet_unet",
        model=ModelConfig(name="mobilenet_unet"),
        encoder=EncoderConfig(trainable=True),
    )
