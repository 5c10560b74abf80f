import dataclasses
import typing
from collections.abc import Callable

import pytest
from flax import nnx

from fetal_flax.config import ModelConfig
from fetal_flax.errors import InputError
from fetal_flax.models import functional
from fetal_flax.models.registry import NETWORKS, create_model

DESCRIBED = ModelConfig()
PUBLISHED = ModelConfig(variant="published")
COMPACT = ModelConfig(variant="compact")
MOBILENET_UNET = ModelConfig(name="mobilenet_unet")
UNET = ModelConfig(name="unet")
SMALL_UNET = ModelConfig(name="unet", base_width=4)


def _size(arrays: dict, of: Callable[[str], bool] = lambda name: True) -> int:
    return sum(array.size for name, array in arrays.items() if of(name))


def test_every_name_of_the_config_is_a_network():
    assert typing.get_args(typing.get_type_hints(ModelConfig)["name"]) == tuple(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
def test_create_model_makes_the_network_of_the_name(name):
    model = nnx.eval_shape(lambda: create_model(ModelConfig(name=name), rngs=nnx.Rngs(0)))
    assert type(model) is NETWORKS[name]
    assert model.config.name == name


@pytest.mark.parametrize(
    ("config", "total"),
    [
        (DESCRIBED, 10_012_177),
        (PUBLISHED, 25_253_893),
        (COMPACT, 3_340_305),
        (MOBILENET_UNET, 13_057_089),
        (UNET, 7_762_465),
    ],
    ids=["described", "published", "compact", "mobilenet_unet", "unet"],
)
def test_parameter_counts_are_exact(config, total):
    assert _size(functional.shapes(config).params) == total


@pytest.mark.parametrize(
    ("config", "trainable"),
    [(DESCRIBED, 7_788_881), (PUBLISHED, 23_030_597), (COMPACT, 1_117_009)],
    ids=["described", "published", "compact"],
)
def test_parameters_of_encoder_and_of_the_rest_are_exact(config, trainable):
    params = functional.shapes(config).params
    assert _size(params, lambda name: name.startswith("encoder/")) == 2_223_296
    assert _size(params, lambda name: not name.startswith("encoder/")) == trainable


@pytest.mark.parametrize(
    ("config", "channels"),
    [
        (DESCRIBED, 1),
        (DESCRIBED, 3),
        (PUBLISHED, 1),
        (COMPACT, 1),
        (MOBILENET_UNET, 3),
        (SMALL_UNET, 3),
    ],
    ids=str,
)
def test_logits_have_the_size_of_the_images(logits_shape, config, channels):
    config = dataclasses.replace(config, in_channels=channels)
    assert logits_shape(config, 2, 64, 96, channels) == (2, 64, 96, 1)


@pytest.mark.parametrize(
    ("config", "images"),
    [
        (DESCRIBED, (1, 48, 64, 1)),
        (DESCRIBED, (1, 64, 80, 1)),
        (DESCRIBED, (1, 64, 64, 3)),
        (DESCRIBED, (64, 64, 1)),
        (DESCRIBED, (0, 64, 64, 1)),
        (DESCRIBED, (1, 0, 64, 1)),
        (MOBILENET_UNET, (1, 64, 40, 1)),
        (SMALL_UNET, (1, 40, 64, 1)),
        (dataclasses.replace(SMALL_UNET, in_channels=3), (1, 64, 64, 1)),
    ],
    ids=str,
)
def test_images_that_do_not_fit_are_refused(logits_shape, config, images):
    with pytest.raises(InputError, match=rf"don't fit {config.name}.*multiples of"):
        logits_shape(config, *images)
