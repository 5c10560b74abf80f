"""Phantoms: the whole path, from data to a trained network, with no download.

    python train.py

RUNTIME
"""

from fetal_flax.config import (
    AugmentationConfig,
    DataConfig,
    EncoderConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)


def config() -> TrainConfig:
    """Returns the run's settings."""
    return TrainConfig(
        name="phantom",
        # Without a download there are no pre-trained weights. Random ones stay frozen, so that
        # the run takes the path that HC18 takes; their batch norms have to settle on the data.
        encoder=EncoderConfig(weights="none", frozen_batch_norm="batch"),
        data=DataConfig(dataset="fetal_phantom", image_size=(128, 128), phantom_count=480),
        # Phantoms vary enough by themselves.
        augmentation=AugmentationConfig(enabled=False),
        # A few minutes have to do: small batches, and a high rate that drops at the first plateau.
        optimizer=OptimizerConfig(learning_rate=1e-3),
        schedule=ScheduleConfig(epochs=7, batch_size=8, patience=1),
    )
