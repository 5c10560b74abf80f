import dataclasses
import math
import typing

import pytest

from fetal_flax.config import DataConfig, LossConfig, ModelConfig, TrainConfig, from_dict
from fetal_flax.errors import InputError


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


SECTIONS = [value for value in vars(TrainConfig()).values() if dataclasses.is_dataclass(value)]
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
