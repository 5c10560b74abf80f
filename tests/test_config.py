import dataclasses
import json
import math
import typing

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
from fetal_flax.errors import InputError

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


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"modle": {}}, "config has no setting modle"),
        ({"model": {"widht": 3, "x": 1}}, "config.model has no setting widht, x"),
        ({"model": {"name": "resnet"}}, "config.model.name can't be 'resnet'"),
        ({"model": {"in_channels": 2}}, "config.model.in_channels"),
        ({"model": {"in_channels": True}}, "config.model.in_channels"),
        ({"model": {"in_channels": 1.0}}, "config.model.in_channels"),
        ({"model": {"aspp_width": "128"}}, "config.model.aspp_width"),
        ({"model": 3}, "config.model can't be 3"),
        ({"seed": 1.5}, "config.seed"),
        ({"seed": True}, "config.seed"),
        ({"name": None}, "config.name"),
        ({"encoder": {"trainable": 1}}, "config.encoder.trainable"),
        ({"encoder": {"learning_rate": True}}, "config.encoder.learning_rate"),
        ({"encoder": {"learning_rate": "3e-5"}}, "config.encoder.learning_rate"),
        ({"data": {"image_size": [256]}}, "config.data.image_size"),
        ({"data": {"image_size": [256, 256.0]}}, "config.data.image_size"),
        ({"data": {"image_size": 256}}, "config.data.image_size"),
        ({"loss": {"pos_weight": "automatic"}}, "config.loss.pos_weight"),
        ({"loss": {"dice_over": "pixel"}}, "config.loss.dice_over"),
        ({"optimizer": {"l2": 10**400}}, "config.optimizer.l2 can't be 1000"),
        ([], "config must hold the settings name, seed"),
        (3, "config must hold the settings"),
        ({"": 1}, "config has no setting ; it has"),
        ({"a\x1b[31m\nb": 1}, "config has no setting 'a\\x1b[31m\\nb';"),
        ({"model": {"name": "x" * 10_000}}, "xxx…"),
    ],
    ids=str,
)
def test_unknown_fields_and_wrong_types_are_named(values, named):
    with pytest.raises(InputError) as error:
        from_dict(TrainConfig, values)
    assert named in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "values",
    [
        {"name": ""},
        {"name": "a\nb"},
        {"name": "\ud800"},
        {"name": "x" * 1001},
        {"seed": -1},
        {"seed": 2**32},
        {"model": {"aspp_width": 4097}},
        {"model": {"base_width": 4097}},
        {"encoder": {"weights": "a\0b"}},
        {"encoder": {"weights": "~nobody-at-all/x.pth"}},
        {"data": {"data_dir": "~nobody-at-all"}},
        {"data": {"cache_dir": "~nobody-at-all/x"}},
        {"data": {"image_size": [32, 4128]}},
        {"data": {"phantom_size": [64, 4097]}},
        {"data": {"workers": 1025}},
        {"data": {"prefetch": 2**31}},
        {"schedule": {"epochs": 10**30}},
        {"encoder": {"learning_rate": 1e39}},
        {"loss": {"smoothing": 1e-320}},
        {"model": {"aspp_width": 0}},
        {"model": {"dropout": 1.0}},
        {"model": {"dropout": -0.1}},
        {"model": {"base_width": 0}},
        {"encoder": {"weights": ""}},
        {"encoder": {"learning_rate": 0.0}},
        {"data": {"image_size": [31, 64]}},
        {"data": {"image_size": [48, 64]}},
        {"data": {"validation_fraction": 0.0}},
        {"data": {"validation_fraction": 1.0}},
        {"data": {"folds": 1}},
        {"data": {"fold": 1}},
        {"data": {"phantom_count": 1}},
        {"data": {"phantom_size": [64, 63]}},
        {"data": {"workers": -1}},
        {"data": {"prefetch": 0}},
        {"augmentation": {"flip_probability": 1.1}},
        {"augmentation": {"affine_probability": -0.1}},
        {"augmentation": {"rotation_degrees": 181.0}},
        {"augmentation": {"scale": 1.0}},
        {"augmentation": {"translation": -0.1}},
        {"loss": {"dice_weight": -1.0}},
        {"loss": {"bce_weight": -1.0}},
        {"loss": {"smoothing": 0.0}},
        {"loss": {"pos_weight": 0.0}},
        {"optimizer": {"learning_rate": -1.0}},
        {"optimizer": {"beta1": 1.0}},
        {"optimizer": {"beta2": -0.1}},
        {"optimizer": {"epsilon": 0.0}},
        {"optimizer": {"l2": -1e-9}},
        {"schedule": {"epochs": 0}},
        {"schedule": {"batch_size": 0}},
        {"schedule": {"factor": 1.0}},
        {"schedule": {"patience": -1}},
        {"schedule": {"threshold": -1e-9}},
        {"schedule": {"min_learning_rate": -1e-9}},
        {"schedule": {"early_stopping_patience": 0}},
    ],
    ids=str,
)
def test_values_out_of_range_are_named(values):
    [(section, value)] = values.items()
    field = f"{section}.{next(iter(value))}" if isinstance(value, dict) else section
    with pytest.raises(InputError, match=rf"^setting {field} must be "):
        from_dict(TrainConfig, values)


SECTIONS = [value for value in vars(DEFAULT).values() if dataclasses.is_dataclass(value)]
FLOATS = [
    (type(section), name)
    for section in SECTIONS
    for name, hint in typing.get_type_hints(type(section)).items()
    if float in (hint, *typing.get_args(hint))
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("section", "field"), FLOATS)
def test_no_setting_takes_nan_or_infinity(section, field, value):
    with pytest.raises(InputError, match=rf"^setting \w+\.{field} must be "):
        section(**{field: value})


def test_a_config_of_another_type_is_refused_where_a_file_makes_it():
    with pytest.raises(InputError, match=r"seed can't be 'x': expected"):
        TrainConfig(seed="x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"data\.image_size can't be"):
        DataConfig(image_size=64)  # pyright: ignore[reportArgumentType]


def test_both_loss_weights_may_not_be_zero():
    with pytest.raises(InputError, match=r"loss\.dice_weight \+ loss\.bce_weight"):
        LossConfig(dice_weight=0.0, bce_weight=0.0)


@pytest.mark.parametrize(("name", "divisor"), [("unet", 16), ("mobilenet_unet", 32)])
def test_image_size_must_suit_the_network(name, divisor):
    fits = DataConfig(image_size=(divisor * 3, divisor * 5))
    TrainConfig(model=ModelConfig(name=name), data=fits)
    too_large = DataConfig(image_size=(divisor * 3, divisor * 5 + divisor // 2))
    with pytest.raises(InputError, match=rf"data\.image_size must be multiples of {divisor}"):
        TrainConfig(model=ModelConfig(name=name), data=too_large)


def test_configs_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEFAULT.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
