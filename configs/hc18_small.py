"""The first half of the recipe that the shipped networks were trained by: images of 128×128.

    python train.py --config configs/hc18_small.py
    python train.py --config configs/hc18_large.py

A quarter of the work of 256×256, and most of what there is to learn; docs/training.md says what
each setting does, and docs/networks.md what came of it. `--model.variant compact` on both lines
trains the compact network; give each run a `--workdir` then, and `--init` the first one's to the
second.
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
        name="hc18_small",
        # The frozen encoder begins with float16's values: shipping the network as float16 then
        # changes no circumference (docs/networks.md).
        encoder=EncoderConfig(float16=True),
        data=DataConfig(image_size=(128, 128), soft_masks=True),
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
