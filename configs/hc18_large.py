"""The second half of the recipe of the shipped networks: images of 256×256, from the first half.

    python train.py --config configs/hc18_small.py
    python train.py --config configs/hc18_large.py

begins with the network in runs/hc18_small; `--init DIR` takes another. docs/networks.md says what
came of it.
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
        name="hc18_large",
        init="runs/hc18_small",
        encoder=EncoderConfig(float16=True),
        data=DataConfig(soft_masks=True),
        augmentation=AugmentationConfig(gain=0.3, gamma=0.5, blur_px=0.7, speckle=0.15, shadow=0.5),
        optimizer=OptimizerConfig(learning_rate=5e-4),
        schedule=ScheduleConfig(
            epochs=8,
            decay="cosine",
            warmup_epochs=0.25,
            average_decay=0.99,
            select_by="ellipse_dice",
            early_stopping_patience=None,
        ),
    )
