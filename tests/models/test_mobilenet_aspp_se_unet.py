import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fetal_flax.config import ModelConfig
from fetal_flax.errors import InputError
from fetal_flax.models import functional
from fetal_flax.models.aspp import ASPP
from fetal_flax.models.decoder import SEStage
from fetal_flax.models.mobilenet_aspp_se_unet import VARIANTS, MobileNetASPPSEUNet
from fetal_flax.models.mobilenet_v2 import MobileNetV2

DESCRIBED = ModelConfig()
PUBLISHED = ModelConfig(variant="published")
COMPACT = ModelConfig(variant="compact")


def test_an_aspp_width_that_groups_cannot_share_is_refused():
    with pytest.raises(InputError, match=r"model\.aspp_width must be a multiple of 32, not 48"):
        functional.shapes(ModelConfig(aspp_width=48))


@pytest.mark.parametrize(
    ("config", "widths"),
    [(DESCRIBED, (512, 256, 128, 64, 32, 32)), (COMPACT, (128, 96, 80, 64, 32, 16))],
    ids=["described", "compact"],
)
def test_intermediate_maps_have_the_documented_shapes(record_shapes, logits_shape, config, widths):
    shapes = record_shapes(MobileNetV2, ASPP, SEStage)
    assert logits_shape(config, 2, 256, 256, 1) == (2, 256, 256, 1)
    encoder, bottleneck, *stages = shapes
    assert encoder == [(128, 128, 16), (64, 64, 24), (32, 32, 32), (16, 16, 96), (8, 8, 1280)]
    assert bottleneck == (8, 8, widths[0])
    sides = (16, 32, 64, 128, 256)
    assert stages == [(n, n, width) for n, width in zip(sides, widths[1:], strict=True)]


def test_published_differs_from_described_where_it_is_documented():
    described, published = functional.shapes(DESCRIBED), functional.shapes(PUBLISHED)
    added = published.params.keys() - described.params.keys()
    assert described.params.keys() <= published.params.keys()
    assert all(name.endswith(("squeeze/bias", "excite/bias")) for name in added)
    assert len(added) == 5 * 2 * 2  # five stages, skip and block, two dense layers
    other_shape = {
        name for name, a in described.params.items() if a.shape != published.params[name].shape
    }
    assert all(name.startswith("aspp/") for name in other_shape)
    assert described.params["aspp/project/conv/kernel"].shape == (1, 1, 640, 512)
    assert published.params["aspp/project/conv/kernel"].shape == (1, 1, 2560, 512)


def test_compact_is_separable_where_it_is_documented():
    names = functional.shapes(COMPACT).params
    blocks = {name.split("/pointwise/")[0] for name in names if "/pointwise/" in name}
    places = [f"stage{n}/block/{conv}/conv" for n in (2, 1) for conv in ("first", "second")]
    assert blocks == {*places, *(f"aspp/atrous/{n}/conv" for n in range(3))}
    assert "stage3/block/first/conv/kernel" in names
    # Nothing between the depthwise and the 1×1 convolution.
    assert not any("depthwise/norm" in name for name in names if not name.startswith("encoder/"))


def test_the_pooled_branch_of_compact_depends_on_the_image():
    variant = VARIANTS["compact"]
    branch = ASPP(
        8, variant.aspp_width, 4, pool_groups=variant.pool_groups, dropout=0, rngs=nnx.Rngs(0)
    )
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 1, 1, 8)), jnp.float32)
    pooled = branch.pool_norm(branch.pool_conv(x))
    # Of two channels a group, each would be 1 or −1.
    distinct = np.unique(np.abs(np.round(np.asarray(pooled), 2)))
    assert len(distinct) > variant.aspp_width // 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_published_stages_have_the_published_order(variant):
    config = ModelConfig(variant=variant)
    network = nnx.eval_shape(lambda: MobileNetASPPSEUNet(config, rngs=nnx.Rngs(0)))
    stages = [network.stage5, network.stage4, network.stage3, network.stage2, network.stage1]
    assert {stage.block.relu_after_sum for stage in stages} == {variant == "published"}


def test_aspp_width_is_a_setting():
    shapes = functional.shapes(ModelConfig(aspp_width=64))
    assert shapes.params["aspp/project/conv/kernel"].shape == (1, 1, 320, 512)
