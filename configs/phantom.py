"""Phantoms: the whole path, from data to a trained network, with no download.

    python train.py

About X minutes on two cores; validation Dice Y.
"""

from fetal_flax.config import (
    DataConfig,
    EncoderConfig,
    ScheduleConfig,
    TrainConfig,
)


def config() -> TrainConfig:
    """Returns the run's settings."""
    return TrainConfig(
        name="phantom",
        # No pre-trained file is at hand without a download, so the encoder has to learn.
        encoder=EncoderConfig(weights="none", trainable=True, learning_rate=1e-3),
        data=DataConfig(
            dataset="fetal_phantom",
            image_size=(128, 128),
            phantom_count=320,
            phantom_size=(135, 200),
        ),
        schedule=ScheduleConfig(epochs=8),
    )
