from fetal_flax.config import ModelConfig
from fetal_flax.models.blocks import DoubleConv
from fetal_flax.models.mobilenet_v2 import MobileNetV2


def test_intermediate_maps_have_the_documented_shapes(record_shapes, logits_shape):
    shapes = record_shapes(MobileNetV2, DoubleConv)
    config = ModelConfig(name="mobilenet_unet")
    assert logits_shape(config, 2, 256, 256, 1) == (2, 256, 256, 1)
    encoder, bottleneck, *stages = shapes
    assert encoder == [(128, 128, 16), (64, 64, 24), (32, 32, 32), (16, 16, 96), (8, 8, 1280)]
    assert bottleneck == (8, 8, 512)
    assert stages == [
        (16, 16, 256),
        (32, 32, 128),
        (64, 64, 64),
        (128, 128, 32),
        (256, 256, 32),
    ]
