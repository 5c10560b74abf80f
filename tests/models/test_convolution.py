import functools
from collections.abc import Callable, Iterator

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from fetal_flax.models import convolution as forms
from fetal_flax.models.convolution import (
    compiler_options,
    compose_up_3x3,
    convolution,
    crop_kernel_to_input,
    depthwise_by_shifts,
    depthwise_on_gpu,
    nhwc_convolution,
    plain_convolution,
    up_convolution_3x3,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def _outputs(form: Callable, x: jax.Array, kernel: jax.Array) -> list[jax.Array]:
    """The convolution and both gradients of its scalar product with something random."""
    y, pullback = jax.vjp(form, x, kernel)
    return [y, *pullback(_random(*y.shape, seed=7))]


def _assert_same(form: Callable, plain: Callable, x: jax.Array, kernel: jax.Array) -> None:
    def both(x: jax.Array, kernel: jax.Array) -> list[list[jax.Array]]:
        return [_outputs(form, x, kernel), _outputs(plain, x, kernel)]

    results, references = jax.jit(both)(x, kernel)
    for result, reference in zip(results, references, strict=True):
        assert result.shape == reference.shape
        assert np.linalg.norm(result - reference) <= 1e-12 * np.linalg.norm(reference)


def _assert_depthwise(
    size: tuple[int, int], taps: tuple[int, int], dilation: int, stride: int
) -> None:
    _assert_same(
        lambda x, k: depthwise_by_shifts(stride, dilation, x, k),
        lambda x, k: plain_convolution(x, k, stride=stride, dilation=dilation, depthwise=True),
        _random(2, *size, 5),
        _random(*taps, 1, 5, seed=1),
    )


# The kernel's gradient adds up bands of 1 to 16 rows: one, one after the other, and single rows.
@hypothesis.settings(max_examples=3, deadline=None)
@hypothesis.example(size=(8, 8), taps=(3, 3), dilation=1, stride=1)
@hypothesis.example(size=(8, 8), taps=(3, 3), dilation=1, stride=2)
@hypothesis.example(size=(7, 10), taps=(3, 3), dilation=1, stride=2)
@hypothesis.example(size=(1, 2), taps=(3, 3), dilation=1, stride=1)
@hypothesis.example(size=(48, 3), taps=(3, 3), dilation=1, stride=1)
@hypothesis.example(size=(48, 3), taps=(3, 3), dilation=1, stride=2)
@hypothesis.example(size=(8, 8), taps=(3, 3), dilation=6, stride=1)
@hypothesis.example(size=(32, 5), taps=(3, 3), dilation=2, stride=1)
@hypothesis.example(size=(4, 6), taps=(1, 1), dilation=1, stride=1)
@hypothesis.example(size=(9, 20), taps=(1, 3), dilation=12, stride=1)
@hypothesis.given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 8)),
    taps=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3])),
    dilation=st.integers(1, 18),
    stride=st.integers(1, 3),
)
def test_depthwise_by_shifts_is_the_grouped_convolution(size, taps, dilation, stride):
    _assert_depthwise(size, taps, dilation, stride)


# Each of three strides with each of two dilations, at sizes that they divide and that they don't.
@hypothesis.settings(max_examples=6, deadline=None)
@hypothesis.example(size=(8, 8), taps=(3, 3), dilation=1, stride=1)
@hypothesis.example(size=(8, 8), taps=(5, 3), dilation=2, stride=2)
@hypothesis.example(size=(9, 4), taps=(3, 3), dilation=2, stride=1)
@hypothesis.example(size=(9, 4), taps=(3, 1), dilation=1, stride=2)
@hypothesis.example(size=(9, 4), taps=(5, 3), dilation=1, stride=3)
@hypothesis.example(size=(1, 7), taps=(3, 3), dilation=2, stride=3)
@hypothesis.example(size=(1, 7), taps=(1, 1), dilation=1, stride=2)
@hypothesis.given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    taps=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3])),
    dilation=st.integers(1, 3),
    stride=st.integers(1, 3),
)
def test_nhwc_convolution_and_its_own_gradients_are_the_plain_form(size, taps, dilation, stride):
    _assert_same(
        lambda x, k: nhwc_convolution(stride, dilation, x, k),
        lambda x, k: plain_convolution(x, k, stride=stride, dilation=dilation),
        _random(2, *size, 3),
        _random(*taps, 3, 4, seed=1),
    )


@pytest.mark.parametrize("form", [nhwc_convolution, depthwise_by_shifts, depthwise_on_gpu])
def test_weight_gradient_of_bfloat16_is_summed_in_float32(form):
    # 256 + 1 is 256 in bfloat16, whose eight bits would lose every row but the first.
    x = jnp.ones((1, 512, 1, 1), jnp.bfloat16).at[0, 0].set(256)
    kernel = jnp.ones((1, 1, 1, 1), jnp.bfloat16)
    _, pullback = jax.vjp(functools.partial(form, 1, 1), x, kernel)
    _, by_kernel = pullback(jnp.ones((1, 512, 1, 1), jnp.bfloat16))
    assert by_kernel.dtype == jnp.bfloat16
    assert float(by_kernel[0, 0, 0, 0]) == pytest.approx(256 + 511, rel=2**-8)


def test_a_depthwise_convolution_of_bfloat16_is_summed_in_float32():
    # In bfloat16, 256 + 1 is 256, tap for tap.
    x = jnp.ones((1, 3, 3, 1), jnp.bfloat16).at[0, 0, 0].set(256)
    y = depthwise_on_gpu(1, 1, x, jnp.ones((3, 3, 1, 1), jnp.bfloat16))
    assert float(np.asarray(y)[0, 1, 1, 0]) == 264


# All taps reach the map, those of one axis, or of neither.
@hypothesis.settings(max_examples=4, deadline=None)
@hypothesis.example(size=(8, 8), dilation=1)
@hypothesis.example(size=(5, 9), dilation=6)
@hypothesis.example(size=(6, 19), dilation=6)
@hypothesis.example(size=(8, 8), dilation=12)
@hypothesis.example(size=(20, 16), dilation=12)
@hypothesis.example(size=(20, 16), dilation=18)
@hypothesis.given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)), dilation=st.integers(1, 20)
)
def test_convolution_by_live_taps_equals_all_taps(size, dilation):
    _assert_same(
        lambda x, k: convolution(x, k, dilation=dilation),
        lambda x, k: plain_convolution(x, k, dilation=dilation),
        _random(2, *size, 3),
        _random(3, 3, 3, 4, seed=1),
    )


@pytest.mark.parametrize(
    ("dilation", "size", "taps"),
    [
        (6, (8, 8), (3, 3)),
        (12, (8, 8), (1, 1)),
        (18, (8, 8), (1, 1)),
        (6, (5, 9), (1, 3)),
        (12, (13, 12), (3, 1)),
        (18, (20, 16), (3, 1)),
        (1, (1, 1), (1, 1)),
        (2, (3, 2), (3, 1)),
    ],
)
def test_live_taps_are_those_that_reach_the_map(dilation, size, taps):
    kernel = _random(3, 3, 2, 2)
    live = crop_kernel_to_input(kernel, dilation, *size)
    assert live.shape == (*taps, 2, 2)
    assert (live[taps[0] // 2, taps[1] // 2] == kernel[1, 1]).all()


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("dilation", [12, 18])
def test_gradient_of_a_dead_tap_is_exactly_zero(dilation, depthwise):
    x, kernel = _random(2, 8, 8, 3), _random(3, 3, *((1, 3) if depthwise else (3, 4)), seed=1)
    form = functools.partial(convolution, dilation=dilation, depthwise=depthwise)
    _, _, gradient = _outputs(form, x, kernel)
    gradient = np.array(gradient)
    assert np.abs(gradient[1, 1]).min() > 0
    gradient[1, 1] = 0
    assert not gradient.any()


@pytest.mark.parametrize("dilation", [6, 12])
def test_a_dilated_depthwise_convolution_equals_all_taps(dilation):
    settings = {"dilation": dilation, "depthwise": True}
    _assert_same(
        functools.partial(convolution, **settings),
        functools.partial(plain_convolution, **settings),
        _random(2, 8, 8, 5),
        _random(3, 3, 1, 5, seed=1),
    )


def test_dilation_of_12_on_a_map_of_8_is_a_convolution_1x1():
    x, kernel = _random(2, 8, 8, 3), _random(3, 3, 3, 4, seed=1)
    _assert_same(
        lambda x, k: convolution(x, k, dilation=12),
        lambda x, k: plain_convolution(x, k[1:2, 1:2]),
        x,
        kernel,
    )


@pytest.mark.parametrize(
    ("size", "stride", "depthwise"),
    [(1, 1, False), (1, 2, False), (3, 1, False), (3, 2, False), (3, 1, True), (3, 2, True)],
)
@pytest.mark.parametrize("sides", [(8, 6), (7, 5)])
@pytest.mark.usefixtures("made_for")
def test_convolution_equals_the_plain_form_whatever_it_picks(sides, size, stride, depthwise):
    x = _random(2, *sides, 4)
    kernel = _random(size, size, 1 if depthwise else 4, 4 if depthwise else 3, seed=1)
    options = {"stride": stride, "depthwise": depthwise}
    _assert_same(
        lambda x, k: convolution(x, k, **options),
        lambda x, k: plain_convolution(x, k, **options),
        x,
        kernel,
    )


@pytest.mark.parametrize(
    ("form", "side", "size", "options"),
    [
        ("depthwise_by_shifts", 6, 3, {"depthwise": True, "stride": 2}),
        ("depthwise_by_shifts", 8, 3, {"depthwise": True, "dilation": 6}),
        ("nhwc_convolution", 6, 1, {}),
        ("nhwc_convolution", 6, 3, {"stride": 2}),
        ("crop_kernel_to_input", 6, 3, {"dilation": 2}),
        ("crop_kernel_to_input", 6, 3, {"depthwise": True, "dilation": 12}),
    ],
)
def test_convolution_uses_the_fast_form_on_a_cpu(monkeypatch, form, side, size, options):
    if jax.default_backend() != "cpu":
        pytest.skip("the choice is for CPUs")
    used, original = [], getattr(forms, form)

    def record(*arguments, **keywords):
        used.append(form)
        return original(*arguments, **keywords)

    monkeypatch.setattr(forms, form, record)
    inputs = 1 if options.get("depthwise") else 4
    convolution(_random(1, side, side, 4), _random(size, size, inputs, 4), **options)
    assert used == [form]


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (4, 6)])
def test_up_convolution_3x3_equals_the_two_convolutions_borders_included(size):
    inputs, between, outputs = 3, 4, 5
    x, bias = _random(2, *size, inputs), _random(between, seed=2)
    up = _random(inputs, 2, 2, between, seed=1)
    kernel = _random(3, 3, between, outputs, seed=3)

    def two(x: jax.Array, up: jax.Array) -> jax.Array:
        between_map = jnp.einsum("nhwi,iabo->nhawbo", x, up)
        between_map = between_map.reshape(2, 2 * size[0], 2 * size[1], between)
        return plain_convolution(between_map + bias.reshape(1, 1, 1, -1), kernel)

    _assert_same(lambda x, up: up_convolution_3x3(x, compose_up_3x3(up, bias, kernel)), two, x, up)


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    forms._cpu_options.cache_clear()
    known = compiler_options()
    forms._cpu_options.cache_clear()
    lower = jax.stages.Lowered.compile

    def without(self, compiler_options):
        return lower(self, {name + "_unknown": value for name, value in compiler_options.items()})

    monkeypatch.setattr(jax.stages.Lowered, "compile", without)
    assert compiler_options() == {}
    forms._cpu_options.cache_clear()
    assert bool(known) == (jax.default_backend() == "cpu")


def test_plain_convolution_pads_evenly_at_stride_2():
    image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    top_left = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1)
    # Padded with a zero before the first row and column, not behind the last.
    expected = [[0, 0], [0, 5]]
    np.testing.assert_array_equal(
        plain_convolution(image, top_left, stride=2)[0, :, :, 0], expected
    )
