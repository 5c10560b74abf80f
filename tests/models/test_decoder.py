import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fetal_flax.config import ModelConfig
from fetal_flax.models import decoder

pytestmark = pytest.mark.usefixtures("quick_compilation")


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
    joined = _record_maps(monkeypatch, decoder.DoubleConv)
    stage = decoder.PlainStage(2, 3, 4, skip_first=skip_first, rngs=nnx.Rngs(0))
    skip = jnp.full((1, 2, 2, 3), 7.0)
    stage(jnp.zeros((1, 1, 1, 2)), skip, train=False)
    [(first, second)] = joined
    assert (first is skip, second is skip) == (skip_first, not skip_first)


def test_an_se_stage_joins_the_upsampled_map_first(monkeypatch):
    joined = _record_maps(monkeypatch, decoder.ResidualSEBlock)
    stage = decoder.SEStage(2, 3, 4, rngs=nnx.Rngs(0))
    stage(jnp.zeros((1, 1, 1, 2)), jnp.ones((1, 2, 2, 3)), train=False)
    [(first, second)] = joined
    assert (first.shape[-1], second.shape[-1]) == (4, 3)


@pytest.mark.parametrize("published", [False, True])
def test_only_the_published_stage_ends_with_a_relu(published):
    stage = decoder.SEStage(4, 4, 8, relu_after_sum=published, se_bias=published, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, skip = rng.uniform(-0.5, 0.5, (1, 2, 2, 4)), rng.uniform(-0.5, 0.5, (1, 4, 4, 4))
    y = stage(jnp.asarray(x, jnp.float32), jnp.asarray(skip, jnp.float32), train=False)
    assert (float(y.min()) >= 0) == published


@pytest.mark.parametrize(
    ("config", "skip_first"),
    [(ModelConfig(name="mobilenet_unet"), False), (ModelConfig(name="unet", base_width=4), True)],
    ids=["mobilenet_unet", "unet"],
)
def test_skips_are_concatenated_in_the_documented_order(
    monkeypatch, logits_shape, config, skip_first
):
    orders = []

    def record(self, x, skip, *, train):
        orders.append(self.skip_first)
        return call(self, x, skip, train=train)

    call = decoder.PlainStage.__call__
    monkeypatch.setattr(decoder.PlainStage, "__call__", record)
    logits_shape(config, 1, 32, 32, 1)
    assert set(orders) == {skip_first}
