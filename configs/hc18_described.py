"""The described network on HC18, trained literally as described: `pos_weight` 200.

    fetal-flax train hc18_described

The description takes 200 from a foreground : background ratio of 1 : 260. That is the ratio of
the unfilled outline; filled heads cover 30 % of the image. See docs/architecture.md.
"""

from fetal_flax.config import LossConfig, TrainConfig


def config() -> TrainConfig:
    """Returns the run's settings."""
    return TrainConfig(name="hc18_described", loss=LossConfig(pos_weight=200.0))
