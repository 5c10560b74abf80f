import dataclasses
import json

import pytest

from fetal_flax.config import (
    AugmentationConfig,
    DataConfig,
    EncoderConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    from_dict,
    to_dict,
)

DEFAULT = TrainConfig()
CHANGED = TrainConfig(
    name="other",
    seed=7,
    deterministic=True,
    init="runs/before",
    model=ModelConfig(
        name="unet", variant="published", in_channels=3, aspp_width=64, base_width=8, dropout=0.0
    ),
    encoder=EncoderConfig(weights="none", float16=True, trainable=True, frozen_batch_norm="batch"),
    data=DataConfig(data_dir="/data", image_size=(48, 80), folds=5, fold=4, workers=0),
    augmentation=AugmentationConfig(enabled=False, speckle=0.2),
    loss=LossConfig(pos_weight=2.5, dice_over="batch"),
    optimizer=OptimizerConfig(l2=0.0),
    schedule=ScheduleConfig(
        epochs=1,
        decay="cosine",
        warmup_epochs=0.5,
        average_decay=0.99,
        early_stopping_patience=None,
        min_learning_rate=0.0,
        non_finite="skip",
    ),
)


@pytest.mark.parametrize("config", [DEFAULT, CHANGED], ids=["default", "changed"])
def test_json_gives_the_config_back(config):
    back = from_dict(TrainConfig, json.loads(json.dumps(to_dict(config), allow_nan=False)))
    assert back == config
    assert isinstance(back.data.image_size, tuple)
    assert hash(back) == hash(config)


def test_the_changed_config_differs_in_every_section():
    for field in dataclasses.fields(TrainConfig):
        assert getattr(CHANGED, field.name) != getattr(DEFAULT, field.name)


def test_absent_fields_take_their_defaults():
    assert from_dict(TrainConfig, {}) == DEFAULT
    assert from_dict(TrainConfig, {"model": {"in_channels": 3}}).model == ModelConfig(in_channels=3)


def test_integers_become_floats_where_floats_are_meant():
    rate = from_dict(TrainConfig, {"optimizer": {"learning_rate": 1}}).optimizer.learning_rate
    assert isinstance(rate, float)
    weight = from_dict(TrainConfig, {"loss": {"pos_weight": 200}}).loss.pos_weight
    assert weight == 200


def test_configs_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEFAULT.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
