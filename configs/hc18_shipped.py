"""The recipe of the networks that the package ships: images of 128×192, 32 epochs.

    fetal-flax train hc18_shipped

and, with `--model.variant compact --workdir runs/hc18_shipped_compact`, the compact one. What each
setting does, and what else was tried, is in docs/training.md; what came of it in docs/networks.md.
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
        name="hc18_shipped",
        # The frozen encoder begins with float16's values: shipping the network as float16 then
        # changes no circumference (docs/networks.md).
        encoder=EncoderConfig(float16=True),
        # HC18's images are 540×800: a square would squeeze heads by a third.
        data=DataConfig(image_size=(128, 192), soft_masks=True),
        augmentation=AugmentationConfig(gain=0.3, gamma=0.5, blur_px=0.7, speckle=0.15, shadow=0.5),
        optimizer=OptimizerConfig(learning_rate=1.5e-3),
        schedule=ScheduleConfig(
            epochs=32,
            decay="cosine",
            warmup_epochs=1,
            average_decay=0.99,
            select_by="ellipse_dice",
            early_stopping_patience=None,
        ),
    )
