import functools

import pytest

from fetal_flax.config import ModelConfig
from fetal_flax.errors import InputError
from fetal_flax.models import complexity
from fetal_flax.models.complexity import DESCRIPTION, Part, Summary

DESCRIBED = ModelConfig(variant="described")
PUBLISHED = ModelConfig(variant="published")
COMPACT = ModelConfig(variant="compact")
summarize = functools.cache(complexity.summarize)


def part(summary: Summary, name: str) -> Part:
    return next(part for part in summary.parts if part.name == name)


@pytest.mark.parametrize(
    ("config", "total", "trainable", "frozen"),
    [
        (DESCRIBED, 10_012_177, 7_788_881, 2_223_296),
        (PUBLISHED, 25_253_893, 23_030_597, 2_223_296),
        (COMPACT, 3_340_305, 1_117_009, 2_223_296),
        (ModelConfig(name="mobilenet_unet"), 13_057_089, 10_833_793, 2_223_296),
        (ModelConfig(name="unet"), 7_762_465, 7_762_465, 0),
    ],
    ids=["described", "published", "compact", "mobilenet_unet", "unet"],
)
def test_parameters_are_those_of_the_published_networks(config, total, trainable, frozen):
    counted = summarize(config, encoder_trainable=False).total
    assert (counted.parameters, counted.trainable, counted.frozen) == (total, trainable, frozen)


def test_compact_keeps_to_the_descriptions_budget():
    total = summarize(COMPACT, encoder_trainable=False).total
    assert total.parameters <= DESCRIPTION["parameters"]
    assert total.trainable <= DESCRIPTION["trainable"]
    assert 2 * total.macs <= DESCRIPTION["gflops"] * 1e9
    # What the description calls 13 MB are its parameters in float32, 13.6.
    assert 4 * total.parameters <= 13.7e6
    assert total.macs == 1_309_142_960


def test_macs_of_a_separable_convolution_are_those_of_its_two_parts():
    stage = part(summarize(COMPACT, False, image_size=(32, 32)), "stage1")
    up, shortcut = 16 * 16 * 32 * (2 * 2 * 16), 32 * 32 * 32 * 16
    convolutions = 32 * 32 * (9 * 32 + 32 * 16 + 9 * 16 + 16 * 16)
    dense = 2 * (2 * 16 * 1)
    assert stage.macs == up + shortcut + convolutions + dense


def test_only_a_frozen_encoder_is_frozen():
    frozen = summarize(DESCRIBED, encoder_trainable=False)
    assert {p.name for p in frozen.parts if p.frozen} == {"encoder"}
    assert part(frozen, "encoder").trainable == 0
    trainable = summarize(DESCRIBED, encoder_trainable=True).total
    assert (trainable.frozen, trainable.trainable) == (0, 10_012_177)


def test_parts_come_in_the_order_of_the_forward_pass():
    names = [p.name for p in summarize(DESCRIBED, False).parts]
    stages = ["stage5", "stage4", "stage3", "stage2", "stage1"]
    assert names == ["init_conv", "encoder", "aspp", *stages, "head"]


def test_macs_of_the_published_network_are_the_measured_prototypes():
    summary = summarize(PUBLISHED, False)
    giga = {p.name: round(p.macs / 1e9, 2) for p in (*summary.parts, summary.total)}
    assert giga["total"] == 5.34
    assert (giga["stage1"], giga["aspp"], giga["encoder"]) == (2.01, 1.26, 0.38)


def test_macs_of_the_encoder_are_torchvisions():
    """torchvision gives 0.301 G for MobileNetV2 at 224×224 with its classifier."""
    config = ModelConfig(in_channels=3)
    encoder = part(summarize(config, False, image_size=(224, 224)), "encoder")
    assert round((encoder.macs + 1280 * 1000) / 1e9, 3) == 0.301


def test_macs_count_every_tap_also_those_that_only_read_padding():
    aspp = part(summarize(DESCRIBED, False), "aspp")
    branches = 8 * 8 * 1280 * 128 * (1 + 3 * 9)
    pooled = 1280 * 128
    project = 8 * 8 * (5 * 128) * 512
    assert aspp.macs == branches + pooled + project


def test_macs_of_transposed_convolutions_are_counted_per_input_pixel():
    summary = summarize(ModelConfig(name="unet", base_width=4), False, image_size=(32, 64))
    up = (16 * 32) * 8 * (2 * 2 * 4)
    convolutions = (32 * 64) * 9 * (8 * 4 + 4 * 4)
    assert part(summary, "stage1").macs == up + convolutions
    assert part(summary, "head").macs == 32 * 64 * 4


def test_macs_of_squeeze_excite_are_counted_once_per_image():
    small, large = (
        part(summarize(DESCRIBED, False, image_size=(side, side)), "stage1").macs
        for side in (32, 64)
    )
    # What doesn't grow with the image: of the skip (32 channels) and of the block (32).
    dense = 2 * (2 * 32 * 2)
    assert large - dense == 4 * (small - dense)


def test_an_image_size_that_does_not_fit_is_an_input_error():
    with pytest.raises(InputError, match="multiples of 32"):
        summarize(DESCRIBED, False, image_size=(256, 250))
