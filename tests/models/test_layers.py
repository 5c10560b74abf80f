from collections.abc import Iterator
from typing import cast

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.core import ShapedArray

from fetal_flax.errors import InputError
from fetal_flax.models.aspp import ASPP
from fetal_flax.models.layers import BatchNorm, Conv, UpConv, broadcast_to_map, normalize

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def _torch_map(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x.transpose(0, 3, 1, 2))


def _our_map(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


def _assert_near(result, reference, tolerance: float = 1e-12) -> None:
    result, reference = np.asarray(result), np.asarray(reference)
    assert result.shape == reference.shape
    assert result.dtype == reference.dtype
    assert np.linalg.norm(result - reference) <= tolerance * np.linalg.norm(reference)


def _torch_norm(scale, bias, mean, var) -> torch.nn.BatchNorm2d:
    norm = torch.nn.BatchNorm2d(len(scale)).double()
    fields = {"weight": scale, "bias": bias, "running_mean": mean, "running_var": var}
    norm.load_state_dict({name: torch.tensor(a) for name, a in fields.items()}, strict=False)
    return norm


def _random_norm(channels: int) -> tuple[BatchNorm, torch.nn.BatchNorm2d]:
    """The same batch norm twice, with no two of its arrays alike."""
    rng = np.random.default_rng(3)
    scale, bias, mean = rng.normal(size=(3, channels))
    var = rng.uniform(0.2, 3, channels)
    norm = BatchNorm(channels)
    arrays = {"scale": scale, "bias": bias, "mean": mean, "var": var}
    for name, array in arrays.items():
        getattr(norm, name).set_value(jnp.asarray(array))
    return norm, _torch_norm(scale, bias, mean, var)


@pytest.mark.parametrize(
    "options",
    [
        {"size": 1},
        {"size": 3, "bias": True},
        {"size": 3, "stride": 2},
        {"size": 3, "dilation": 2},
        {"size": 3, "dilation": 6},
        {"size": 3, "depthwise": True},
        {"size": 3, "depthwise": True, "stride": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("sides", [(8, 10), (7, 5)])
@pytest.mark.usefixtures("float64")
def test_conv_is_torchs(sides, options):
    size, stride, dilation = options["size"], options.get("stride", 1), options.get("dilation", 1)
    depthwise, bias = options.get("depthwise", False), options.get("bias", False)
    outputs = 4 if depthwise else 3
    ours = Conv(4, outputs, **options, rngs=nnx.Rngs(0))
    theirs = torch.nn.Conv2d(
        4,
        outputs,
        size,
        stride=stride,
        padding=dilation * (size // 2),
        dilation=dilation,
        groups=4 if depthwise else 1,
        bias=bias,
    ).double()
    ours.kernel.set_value(jnp.asarray(theirs.weight.detach().numpy().transpose(2, 3, 1, 0)))
    if ours.bias is not None:
        assert theirs.bias is not None
        ours.bias.set_value(jnp.asarray(theirs.bias.detach().numpy()))
    x = _random(2, *sides, 4)
    _assert_near(ours(jnp.asarray(x)), _our_map(theirs(_torch_map(x))))


@pytest.mark.usefixtures("float64")
def test_up_conv_is_torchs_transposed_convolution():
    ours = UpConv(3, 5, rngs=nnx.Rngs(0))
    theirs = torch.nn.ConvTranspose2d(3, 5, 2, stride=2).double()
    assert theirs.bias is not None
    ours.kernel.set_value(jnp.asarray(theirs.weight.detach().numpy().transpose(0, 2, 3, 1)))
    ours.bias.set_value(jnp.asarray(theirs.bias.detach().numpy()))
    x = _random(2, 4, 6, 3)
    _assert_near(ours(jnp.asarray(x)), _our_map(theirs(_torch_map(x))))


@pytest.mark.usefixtures("float64")
def test_batch_norm_is_torchs_in_evaluation():
    ours, theirs = _random_norm(6)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(ours)))
    x = _random(3, 4, 5, 6)
    _assert_near(ours(jnp.asarray(x), train=False), _our_map(theirs.eval()(_torch_map(x))))
    after = nnx.to_pure_dict(nnx.state(ours))
    assert all((after[name] == before[name]).all() for name in before)


@pytest.mark.usefixtures("float64", "made_for")
def test_batch_norm_is_torchs_in_training_and_so_are_its_running_statistics():
    ours, theirs = _random_norm(6)
    theirs.train()
    for step in range(3):
        # Twelve values per channel: dividing by n instead of n - 1 would be 8 % off.
        x = 2 + _random(3, 2, 2, 6, seed=step) * np.arange(1, 7)
        _assert_near(ours(jnp.asarray(x), train=True), _our_map(theirs(_torch_map(x))))
        assert theirs.running_mean is not None and theirs.running_var is not None
        _assert_near(ours.mean[...], theirs.running_mean)
        _assert_near(ours.var[...], theirs.running_var)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.usefixtures("float64")
def test_conv_of_several_maps_is_that_of_their_concatenation(size):
    conv = Conv(6, 4, size, bias=True, rngs=nnx.Rngs(0))
    maps = [jnp.asarray(_random(2, 5, 3, channels, seed=channels)) for channels in (1, 3, 2)]
    _assert_near(conv(*maps), conv(jnp.concatenate(maps, -1)))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.usefixtures("float64", "made_for")
def test_batch_norm_has_torchs_gradients(train):
    ours, theirs = _random_norm(4)
    x, weights = _random(3, 4, 5, 4), _random(3, 4, 5, 4, seed=1)
    structure, params, batch_stats = nnx.split(ours, nnx.Param, nnx.BatchStat)

    @jax.jit
    def product(params, batch_stats, x):
        norm = nnx.merge(structure, params, batch_stats)
        return (norm(x, train=train) * jnp.asarray(weights)).sum()

    by_params, by_x = jax.grad(product, argnums=(0, 2))(params, batch_stats, jnp.asarray(x))
    torch_x = _torch_map(x).requires_grad_()
    (theirs.train(train)(torch_x) * _torch_map(weights)).sum().backward()
    assert torch_x.grad is not None
    assert theirs.weight.grad is not None and theirs.bias.grad is not None
    _assert_near(by_x, _our_map(torch_x.grad), 1e-11)
    _assert_near(by_params["scale"][...], theirs.weight.grad, 1e-11)
    _assert_near(by_params["bias"][...], theirs.bias.grad, 1e-11)


def test_batch_norm_keeps_its_digits_far_from_zero(made_for):
    x = np.float32(1000 + 0.1 * _random(4, 8, 8, 3))
    norm = BatchNorm(3)
    if made_for == "gpu":
        # Ten deviations off are not too many.
        norm.mean.set_value(jnp.full(3, 999, jnp.float32))
    y = norm(jnp.asarray(x), train=True)
    wide = x.astype(np.float64)
    var = 0.9 + 0.1 * wide.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(norm.var[...], var, rtol=1e-6)
    expected = (wide - wide.mean((0, 1, 2))) / np.sqrt(wide.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-2)


def test_on_a_gpu_no_sum_of_a_batch_norms_statistics_waits_for_another(made_for):
    """So they are taken in one pass over the map, and in one collective."""
    vector, x = jnp.ones(3), jnp.ones((2, 4, 4, 3))
    jaxpr = jax.make_jaxpr(lambda x: normalize(x, vector, vector, vector)[1:])(x)
    longest = max(_sums_in_a_row(jaxpr.jaxpr, [0], size=x.size))
    assert longest == (1 if made_for == "gpu" else 2)


def _sums_in_a_row(jaxpr: jax.extend.core.Jaxpr, before: list[int], *, size: int) -> list[int]:
    """Returns behind how many sums over so many numbers, in a row, each output stands."""
    rows = dict(zip(jaxpr.invars, before, strict=True))

    def row(variable) -> int:
        return 0 if isinstance(variable, jax.extend.core.Literal) else rows.get(variable, 0)

    for equation in jaxpr.eqns:
        inputs = list(map(row, equation.invars))
        inner = equation.params.get("call_jaxpr") or equation.params.get("jaxpr")
        is_sum = equation.primitive.name == "reduce_sum"
        summed = is_sum and cast(ShapedArray, equation.invars[0].aval).size >= size
        outputs = [max(inputs, default=0) + summed] * len(equation.outvars)
        if inner is not None:
            outputs = _sums_in_a_row(inner.jaxpr, inputs, size=size)
        rows |= zip(equation.outvars, outputs, strict=True)
    return list(map(row, jaxpr.outvars))


def test_batch_norm_of_bfloat16_takes_its_statistics_in_float32():
    x = jnp.asarray(3 + _random(4, 8, 8, 3), jnp.bfloat16)
    norm = BatchNorm(3)
    y = norm(x, train=True)
    wide = np.asarray(x, np.float64)
    assert y.dtype == jnp.bfloat16
    assert norm.mean[...].dtype == norm.var[...].dtype == jnp.float32
    np.testing.assert_allclose(norm.mean[...], 0.1 * wide.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * wide.var((0, 1, 2), ddof=1), rtol=1e-6)


def test_batch_norm_refuses_to_train_on_a_single_value():
    with pytest.raises(InputError, match="larger batch or image"):
        BatchNorm(3)(jnp.ones((1, 1, 1, 3)), train=True)


@pytest.mark.parametrize("layer", [Conv, UpConv])
def test_a_layer_computes_in_the_dtype_of_its_map(layer):
    arguments = (2, 3, 1) if layer is Conv else (2, 3)
    layer = layer(*arguments, rngs=nnx.Rngs(0))
    assert layer.kernel[...].dtype == jnp.float32
    assert layer(jnp.ones((1, 4, 4, 2), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("per_image", [False, True])
def test_what_a_bfloat16_map_repeats_has_its_gradient_summed_in_float32(per_image):
    # 256 + 1 is 256 in bfloat16, whose eight bits would lose every pixel but the first.
    gradient = jnp.ones((2, 64, 64, 3), jnp.bfloat16).at[:, 0, 0].set(256)
    values = jnp.ones((2 if per_image else 1, 1, 1, 3), jnp.bfloat16)
    repeated, pullback = jax.vjp(lambda v: broadcast_to_map(v, gradient.shape), values)
    np.testing.assert_array_equal(repeated, jnp.broadcast_to(values, gradient.shape))
    (summed,) = pullback(gradient)
    assert summed.dtype == jnp.bfloat16 and summed.shape == values.shape
    exact = (1 if per_image else 2) * (256 + 64 * 64 - 1)
    np.testing.assert_allclose(summed.astype(jnp.float32), exact, rtol=2**-8)


@pytest.mark.parametrize(
    ("offset", "scale", "dtype", "tolerance"),
    [
        # Values as small as the root of epsilon, so that another epsilon shows.
        (0, 1e-3, np.float64, 1e-12),
        # Far from zero, so that E[x²] − E[x]² shows.
        (1000, 1, np.float32, 5e-3),
    ],
)
@pytest.mark.usefixtures("float64")
def test_the_group_norm_of_aspp_is_torchs(offset, scale, dtype, tolerance):
    norm = ASPP(8, 128, 8, dropout=0, rngs=nnx.Rngs(0)).pool_norm
    x = (offset + scale * _random(3, 1, 1, 128)).astype(dtype)
    reference = _our_map(torch.nn.GroupNorm(32, 128).double()(_torch_map(x).double()))
    # Flax mixes dtypes inside.
    with jax.numpy_dtype_promotion("standard"):
        _assert_near(norm(jnp.asarray(x)), reference.astype(dtype), tolerance)


@pytest.mark.parametrize(
    ("create", "theirs"),
    [
        (lambda rngs: Conv(64, 512, 3, bias=True, rngs=rngs), torch.nn.Conv2d(64, 512, 3)),
        (
            lambda rngs: Conv(512, 512, 3, depthwise=True, bias=True, rngs=rngs),
            torch.nn.Conv2d(512, 512, 3, groups=512),
        ),
        (lambda rngs: UpConv(64, 512, rngs=rngs), torch.nn.ConvTranspose2d(64, 512, 2)),
    ],
    ids=["conv", "depthwise", "transposed"],
)
def test_initial_values_have_torchs_range(create, theirs):
    layer = create(nnx.Rngs(0))
    for ours, reference in ((layer.kernel, theirs.weight), (layer.bias, theirs.bias)):
        ours, reference = np.asarray(ours[...]), reference.detach().numpy()
        assert ours.size == reference.size
        assert np.abs(ours).max() == pytest.approx(np.abs(reference).max(), rel=0.05)
        assert ours.std() == pytest.approx(reference.std(), rel=0.15)
