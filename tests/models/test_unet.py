from fetal_flax.config import ModelConfig
from fetal_flax.models.blocks import DoubleConv

SMALL_UNET = ModelConfig(name="unet", base_width=4)


def test_unet_takes_multiples_of_16(logits_shape):
    assert logits_shape(SMALL_UNET, 1, 48, 16, 1) == (1, 48, 16, 1)


def test_intermediate_maps_have_the_documented_shapes(record_shapes, logits_shape):
    shapes = record_shapes(DoubleConv)
    logits_shape(SMALL_UNET, 1, 256, 256, 1)
    down = [(256, 256, 4), (128, 128, 8), (64, 64, 16), (32, 32, 32)]
    assert shapes == [*down, (16, 16, 64), *down[::-1]]
