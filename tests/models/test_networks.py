import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fetal_flax.config import ModelConfig
from fetal_flax.errors import InputError
from fetal_flax.models import aspp, functional, mobilenet_v2, unet
from fetal_flax.models.functional import Variables

QUICK_COMPILATION = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
DESCRIBED = ModelConfig()
PUBLISHED = ModelConfig(variant="published")
COMPACT = ModelConfig(variant="compact")
MOBILENET_UNET = ModelConfig(name="mobilenet_unet")
UNET = ModelConfig(name="unet")
SMALL_UNET = ModelConfig(name="unet", base_width=4)


@functools.cache
def _initialised(config: ModelConfig) -> Variables:
    return functional.init(config, 0)


@functools.cache
def _compiled(config: ModelConfig, train: bool = False, train_encoder: bool = False) -> Callable:
    """The network with random arrays, a function of images and a dropout key."""

    def forward(variables, images, key):
        if not train:
            return functional.apply(config, variables, images), variables.batch_stats
        return functional.apply_train(
            config, variables, images, dropout_key=key, train_encoder=train_encoder
        )

    run = jax.jit(forward, compiler_options=QUICK_COMPILATION)
    variables = _initialised(dataclasses.replace(config, dtype="float32"))
    return lambda images, key=0: run(variables, images, jax.random.key(key))


def _images(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).uniform(size=shape), jnp.float32)


def _shape(config: ModelConfig, *images: int) -> tuple[int, ...]:
    logits = jax.eval_shape(
        lambda variables, x: functional.apply(config, variables, x),
        functional.shapes(config),
        jax.ShapeDtypeStruct(images, jnp.float32),
    )
    assert logits.dtype == jnp.float32
    return logits.shape


def _size(arrays: dict, of: Callable[[str], bool] = lambda name: True) -> int:
    return sum(array.size for name, array in arrays.items() if of(name))


def _differing(ours: dict, theirs: dict) -> set[str]:
    return {name for name in ours if not np.array_equal(ours[name], theirs[name])}


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
def test_logits_have_the_size_of_the_images(config, channels):
    config = dataclasses.replace(config, in_channels=channels)
    assert _shape(config, 2, 64, 96, channels) == (2, 64, 96, 1)


def test_unet_takes_multiples_of_16():
    assert _shape(SMALL_UNET, 1, 48, 16, 1) == (1, 48, 16, 1)


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
def test_images_that_do_not_fit_are_refused(config, images):
    with pytest.raises(InputError, match=rf"don't fit {config.name}.*multiples of"):
        _shape(config, *images)


def test_an_aspp_width_that_groups_cannot_share_is_refused():
    with pytest.raises(InputError, match=r"model\.aspp_width must be a multiple of 32, not 48"):
        functional.shapes(ModelConfig(aspp_width=48))


@pytest.mark.parametrize(
    ("config", "bottleneck", "stages"),
    [(DESCRIBED, 512, (256, 128, 64, 32, 32)), (COMPACT, 128, (96, 80, 64, 32, 16))],
    ids=["described", "compact"],
)
def test_intermediate_maps_have_the_documented_shapes(monkeypatch, config, bottleneck, stages):
    shapes = {}

    def record(module: type, name: str, number: Callable) -> None:
        call = module.__call__

        def recorded(self, *arguments, **keywords):
            y = call(self, *arguments, **keywords)
            shapes[f"{name}{number(y)}"] = jax.tree.map(lambda a: a.shape[1:], y)
            return y

        monkeypatch.setattr(module, "__call__", recorded)

    record(mobilenet_v2.MobileNetV2, "encoder", lambda y: "")
    record(aspp.ASPP, "aspp", lambda y: "")
    record(unet.SEStage, "stage", lambda y: 9 - y.shape[1].bit_length() + 1)
    assert _shape(config, 2, 256, 256, 1) == (2, 256, 256, 1)
    assert shapes == {
        "encoder": [(128, 128, 16), (64, 64, 24), (32, 32, 32), (16, 16, 96), (8, 8, 1280)],
        "aspp": (8, 8, bottleneck),
        "stage5": (16, 16, stages[0]),
        "stage4": (32, 32, stages[1]),
        "stage3": (64, 64, stages[2]),
        "stage2": (128, 128, stages[3]),
        "stage1": (256, 256, stages[4]),
    }


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
    variant = unet.VARIANTS["compact"]
    branch = aspp.ASPP(
        8, variant.aspp_width, 4, pool_groups=variant.pool_groups, dropout=0, rngs=nnx.Rngs(0)
    )
    pooled = branch.pool_norm(branch.pool_conv(_images(2, 1, 1, 8)))
    # Of two channels a group, each would be 1 or −1.
    distinct = np.unique(np.abs(np.round(np.asarray(pooled), 2)))
    assert len(distinct) > variant.aspp_width // 2


@pytest.mark.parametrize("config", [DESCRIBED, PUBLISHED], ids=["described", "published"])
def test_only_the_published_block_ends_with_a_relu(config):
    variant = unet.VARIANTS[config.variant]
    stage = unet.SEStage(4, 4, 8, variant, rngs=nnx.Rngs(0))
    y = stage(_images(1, 2, 2, 4) - 0.5, _images(1, 4, 4, 4) - 0.5, train=False)
    assert (float(y.min()) >= 0) == (config is PUBLISHED)


def test_aspp_width_is_a_setting():
    shapes = functional.shapes(ModelConfig(aspp_width=64))
    assert shapes.params["aspp/project/conv/kernel"].shape == (1, 1, 320, 512)


@pytest.mark.parametrize(
    ("config", "skip_first"),
    [(MOBILENET_UNET, False), (SMALL_UNET, True)],
    ids=["mobilenet_unet", "unet"],
)
def test_skips_are_concatenated_in_the_documented_order(monkeypatch, config, skip_first):
    orders = []

    def record(self, x, skip, *, train):
        orders.append(self.skip_first)
        return call(self, x, skip, train=train)

    call = unet.PlainStage.__call__
    monkeypatch.setattr(unet.PlainStage, "__call__", record)
    _shape(config, 1, 32, 32, 1)
    assert set(orders) == {skip_first}


def _record_maps(monkeypatch: pytest.MonkeyPatch, block: type) -> list[tuple]:
    """The maps that blocks of this kind are given from here on."""
    given, call = [], block.__call__

    def record(self, *maps, train):
        given.append(maps)
        return call(self, *maps, train=train)

    monkeypatch.setattr(block, "__call__", record)
    return given


@pytest.mark.parametrize("skip_first", [False, True])
def test_a_plain_stage_joins_in_its_order(monkeypatch, skip_first):
    joined = _record_maps(monkeypatch, unet.DoubleConv)
    stage = unet.PlainStage(2, 3, 4, skip_first=skip_first, rngs=nnx.Rngs(0))
    skip = jnp.full((1, 2, 2, 3), 7.0)
    stage(jnp.zeros((1, 1, 1, 2)), skip, train=False)
    [(first, second)] = joined
    assert (first is skip, second is skip) == (skip_first, not skip_first)


def test_an_se_stage_joins_the_upsampled_map_first(monkeypatch):
    joined = _record_maps(monkeypatch, unet.ResidualSEBlock)
    stage = unet.SEStage(2, 3, 4, unet.VARIANTS["described"], rngs=nnx.Rngs(0))
    stage(jnp.zeros((1, 1, 1, 2)), jnp.ones((1, 2, 2, 3)), train=False)
    [(first, second)] = joined
    assert (first.shape[-1], second.shape[-1]) == (4, 3)


def test_init_depends_on_the_seed_alone():
    first, again, other = (functional.init(SMALL_UNET, seed) for seed in (3, 3, 4))
    assert not _differing(first.params, again.params)
    kernels = {name for name in first.params if "kernel" in name}
    assert kernels and _differing(first.params, other.params) >= kernels


def test_no_two_layers_begin_alike():
    params = _initialised(DESCRIBED).params
    kernels = [np.asarray(a).ravel()[:8] for name, a in params.items() if name.endswith("kernel")]
    assert len({kernel.tobytes() for kernel in kernels}) == len(kernels)


def test_shapes_are_those_of_init():
    shapes, arrays = functional.shapes(SMALL_UNET), functional.init(SMALL_UNET, 0)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), arrays) == jax.tree.map(
        lambda a: (a.shape, a.dtype), shapes
    )


@pytest.mark.parametrize(
    "config",
    [pytest.param(DESCRIBED, marks=pytest.mark.slow), SMALL_UNET],
    ids=["described", "unet"],
)
def test_bfloat16_gives_float32_logits_near_those_of_float32(config):
    images = _images(2, 64, 64, 1)
    exact, _ = _compiled(config)(images)
    rough, _ = _compiled(dataclasses.replace(config, dtype="bfloat16"))(images)
    assert rough.dtype == jnp.float32
    assert 0 < np.linalg.norm(rough - exact) < 0.02 * np.linalg.norm(exact)


def test_bfloat16_keeps_statistics_in_float32():
    config = dataclasses.replace(SMALL_UNET, dtype="bfloat16")
    _, batch_stats = _compiled(config, train=True)(_images(2, 32, 32, 1))
    assert {array.dtype.name for array in batch_stats.values()} == {"float32"}


def test_evaluation_needs_no_key():
    logits = jax.jit(
        lambda v, x: functional.apply(DESCRIBED, v, x), compiler_options=QUICK_COMPILATION
    )(_initialised(DESCRIBED), _images(2, 64, 64, 1))
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("train_encoder", [False, True])
def test_training_updates_the_encoders_statistics_only_on_request(train_encoder):
    before = _initialised(DESCRIBED).batch_stats
    _, after = _compiled(DESCRIBED, True, train_encoder)(_images(2, 64, 64, 1))
    encoder = {name for name in before if name.startswith("encoder/")}
    expected = before.keys() if train_encoder else before.keys() - encoder
    assert after.keys() == before.keys()
    assert _differing(before, after) == expected


def test_dropout_depends_on_the_key_alone():
    run, images = _compiled(DESCRIBED, train=True), _images(2, 64, 64, 1)
    (first, _), (again, _), (other, _) = run(images, 0), run(images, 0), run(images, 1)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_encoder_part_is_the_encoder_alone():
    part = functional.encoder_part(functional.shapes(DESCRIBED))
    assert functional.STEM in part.params
    assert len(part.params) + len(part.batch_stats) == 52 + 4 * 52
    assert not any(functional.encoder_part(functional.shapes(SMALL_UNET)))
