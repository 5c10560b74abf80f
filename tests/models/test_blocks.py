import copy
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision
from flax import nnx, traverse_util
from torch import nn

from fetal_flax.config import ModelConfig
from fetal_flax.conversion.encoder_weights import read_encoder
from fetal_flax.conversion.names import IGNORED, TABLES, find
from fetal_flax.models.aspp import ASPP
from fetal_flax.models.blocks import DoubleConv, ResidualSEBlock, SqueezeExcite, max_pool
from fetal_flax.models.mobilenet_v2 import OUT_INDICES, InvertedResidual, MobileNetV2
from fetal_flax.parity import reference

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Place(NamedTuple):
    """Where a block stands in a network, in our names and PyTorch's."""

    layout: str
    ours: str
    torch: str


SKIP_SE = Place("mobilenet_aspp_se_unet", "stage5/skip_se", "skip5_se")
SE_BLOCK = Place("mobilenet_aspp_se_unet", "stage5/block", "dec5")
SEPARABLE_BLOCK = Place("mobilenet_aspp_se_unet", "stage1/block", "dec1")
BOTTLENECK = Place("mobilenet_aspp_se_unet", "aspp", "bottleneck_aspp")
DOUBLE_CONV = Place("unet", "down1", "inc.double_conv")


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def randomised(module: nn.Module) -> nn.Module:
    """The module in float64, its norms with no two arrays alike."""
    generator = torch.Generator().manual_seed(0)
    module.double()
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(part.weight, 0.5, 2, generator)
            nn.init.uniform_(part.bias, -1, 1, generator)
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None and part.running_var is not None
            nn.init.uniform_(part.running_mean, -1, 1, generator)
            nn.init.uniform_(part.running_var, 0.2, 3, generator)
    return module


def load(ours: nnx.Module, theirs: nn.Module, place: Place) -> nnx.State:
    """Returns our block's state with the arrays of PyTorch's, converted as if they stood in a
    network."""
    arrays = {}
    for torch_name, tensor in theirs.state_dict().items():
        if IGNORED.fullmatch(torch_name):
            continue
        target = find(f"{place.torch}.{torch_name}", TABLES[place.layout])
        assert target is not None, torch_name
        name, layout = target
        array = layout.to_ours(tensor.numpy())
        assert array is not None, torch_name
        path = name.removeprefix(f"{place.ours}/").split("/")
        arrays[tuple(int(p) if p.isdigit() else p for p in path)] = jnp.asarray(np.array(array))
    state = nnx.state(ours)
    shapes = {path: variable[...].shape for path, variable in nnx.to_flat_state(state)}
    assert shapes == {path: array.shape for path, array in arrays.items()}
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(arrays))
    return state


def run(ours: nnx.Module, state: nnx.State, x: np.ndarray, **options) -> tuple:
    """Returns the block's output and its state afterwards."""

    def forward(state: nnx.State, x: jax.Array) -> tuple:
        block = nnx.merge(nnx.graphdef(ours), state)
        return block(x, **options), nnx.state(block)

    return jax.jit(forward)(state, jnp.asarray(x))


def random_map(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape)


def torch_map(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x.transpose(0, 3, 1, 2))


def assert_near(result, reference: torch.Tensor, tolerance: float = 1e-12) -> None:
    result, reference_array = np.asarray(result), reference.detach().numpy()
    if result.ndim == 4:
        reference_array = reference_array.transpose(0, 2, 3, 1)
    assert result.shape == reference_array.shape
    assert result.dtype == reference_array.dtype
    difference = np.linalg.norm(result - reference_array)
    assert difference <= tolerance * np.linalg.norm(reference_array)


def assert_same_block(ours: nnx.Module, theirs: nn.Module, place: Place, x: np.ndarray) -> None:
    """Compares outputs in evaluation and training, and the statistics after training."""
    randomised(theirs)
    state = load(ours, theirs, place)
    for train in (False, True):
        y, after = run(ours, state, x, train=train)
        assert_near(y, theirs.train(train)(torch_map(x)))
    compared = load(ours, theirs, place)
    for (path, result), (_, expected) in zip(
        nnx.to_flat_state(after), nnx.to_flat_state(compared), strict=True
    ):
        np.testing.assert_allclose(result[...], expected[...], rtol=1e-11, err_msg=str(path))


@pytest.mark.usefixtures("made_for")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("channels", [5, 48])
def test_squeeze_excite_is_torchs(channels, bias):
    ours = SqueezeExcite(channels, bias=bias, rngs=nnx.Rngs(0))
    theirs = randomised(reference.SqueezeExcite(channels, bias))
    x = random_map(2, 4, 6, channels)
    y, _ = run(ours, load(ours, theirs, SKIP_SE), x)
    assert_near(y, theirs(torch_map(x)))


@pytest.mark.usefixtures("made_for")
@pytest.mark.parametrize("published", [False, True], ids=["described", "published"])
@pytest.mark.parametrize("inputs", [6, 32])
def test_residual_se_block_is_torchs(inputs, published):
    ours = ResidualSEBlock(
        inputs, 32, relu_after_sum=published, se_bias=published, rngs=nnx.Rngs(0)
    )
    theirs = reference.ResidualSEBlock(inputs, 32, published)
    assert_same_block(ours, theirs, SE_BLOCK, random_map(2, 6, 4, inputs))


@pytest.mark.usefixtures("made_for")
def test_separable_residual_se_block_is_torchs():
    options = {"relu_after_sum": False, "se_bias": False, "separable": True}
    ours = ResidualSEBlock(6, 32, **options, rngs=nnx.Rngs(0))
    theirs = reference.ResidualSEBlock(6, 32, False, separable=True)
    assert_same_block(ours, theirs, SEPARABLE_BLOCK, random_map(2, 6, 4, 6))


def test_double_conv_is_torchs():
    ours = DoubleConv(3, 5, rngs=nnx.Rngs(0))
    assert_same_block(ours, reference.double_conv(3, 5), DOUBLE_CONV, random_map(2, 6, 4, 3))


@pytest.mark.parametrize("sides", [(8, 8), (20, 13)])
def test_aspp_without_dropout_is_torchs(sides):
    ours = ASPP(6, 64, 8, dropout=0, rngs=nnx.Rngs(0))
    assert_same_block(ours, reference.ASPP(6, 64, 8, 0.0), BOTTLENECK, random_map(2, *sides, 6))


@pytest.mark.usefixtures("made_for")
def test_compact_aspp_without_dropout_is_torchs():
    ours = ASPP(6, 64, 8, pool_groups=8, separable=True, dropout=0, rngs=nnx.Rngs(0))
    theirs = reference.ASPP(6, 64, 8, 0.0, compact=True)
    assert_same_block(ours, theirs, BOTTLENECK, random_map(2, 9, 8, 6))


def test_aspp_drops_out_after_the_projection_in_training_only():
    ours = ASPP(6, 32, 64, dropout=0.5, rngs=nnx.Rngs(0))
    theirs = randomised(reference.ASPP(6, 32, 64, 0.0))
    state, x = load(ours, theirs, BOTTLENECK), random_map(4, 8, 8, 6)
    assert_near(run(ours, state, x, train=False)[0], theirs.eval()(torch_map(x)))
    y, _ = run(ours, state, x, train=True, dropout_key=jax.random.key(0))
    kept = theirs.train()(torch_map(x)).detach().numpy().transpose(0, 2, 3, 1)
    on = np.asarray(y) != 0
    np.testing.assert_allclose(np.asarray(y)[on], 2 * kept[on], rtol=1e-8)
    assert on[kept > 0].mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("ties", [False, True])
def test_max_pool_is_torchs_and_so_is_its_gradient(ties):
    x, weights = random_map(2, 6, 4, 3), random_map(2, 3, 2, 3)
    if ties:
        x = np.maximum(np.round(x), 0)
    y, pullback = jax.vjp(max_pool, jnp.asarray(x))
    theirs = torch_map(x).requires_grad_()
    reference = torch.max_pool2d(theirs, 2)
    reference.backward(torch_map(weights))
    assert theirs.grad is not None
    assert_near(y, reference, 0)
    assert_near(pullback(jnp.asarray(weights))[0], theirs.grad, 0)


@pytest.fixture(scope="module")
def torchvision_network(tmp_path_factory) -> tuple[nn.Sequential, Path]:
    """torchvision's encoder in float64, and a float32 file with the same numbers."""
    network = torchvision.models.mobilenet_v2()
    randomised(network)
    path = tmp_path_factory.mktemp("torchvision") / "mobilenet_v2.pth"
    torch.save(network.float().state_dict(), path)
    return network.features.double(), path


@pytest.fixture(scope="module")
def encoder(torchvision_network) -> tuple[MobileNetV2, nnx.State, nn.Sequential]:
    """Our encoder, its state as the conversion reads it, and torchvision's."""
    theirs, path = torchvision_network
    read = read_encoder(path, ModelConfig(in_channels=3))
    ours = nnx.eval_shape(lambda: MobileNetV2(3, rngs=nnx.Rngs(0)))
    arrays = {}
    for name, array in (read.params | read.batch_stats).items():
        _, *place = name.split("/")
        path = tuple(int(p) if p.isdigit() else p for p in place)
        arrays[path] = np.asarray(array, np.float64)
    state = nnx.state(ours)
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(arrays))
    return ours, state, theirs


def _taps(features: nn.Sequential, x: np.ndarray) -> list[torch.Tensor]:
    y, maps = torch_map(x), []
    for block in features:
        y = block(y)
        maps.append(y)
    return [maps[i] for i in OUT_INDICES]


# Without expansion; stride 2; with a shortcut; stride 1 without a shortcut.
@pytest.mark.parametrize(
    ("index", "channels", "train"), [(1, 32, False), (2, 16, True), (3, 24, True), (11, 64, False)]
)
def test_inverted_residual_is_torchvisions(encoder, index, channels, train):
    ours, state, features = encoder
    x = 3 * random_map(2, 6, 8, channels)
    theirs = copy.deepcopy(features[index]).train(train)
    assert isinstance(ours.blocks[index], InvertedResidual)
    y, _ = run(ours.blocks[index], state["blocks"][index], x, train=train)
    assert_near(y, theirs(torch_map(x)), 1e-11)


def test_mobilenet_taps_are_torchvisions(encoder):
    ours, state, features = encoder
    x = np.random.default_rng(1).uniform(size=(2, 64, 64, 3))
    taps, after = run(ours, state, x, train=False)
    for tap, expected in zip(taps, _taps(features.eval(), x), strict=True):
        assert_near(tap, expected, 1e-10)
    unchanged = jax.tree.map(lambda a, b: (a == b).all(), after, state)
    assert all(jax.tree.leaves(unchanged))


@pytest.mark.slow
def test_mobilenet_in_training_is_torchvisions_statistics_included(encoder):
    ours, state, features = encoder
    theirs = copy.deepcopy(features).train()
    x = np.random.default_rng(1).uniform(size=(2, 64, 64, 3))
    taps, after = run(ours, state, x, train=True)
    for tap, expected in zip(taps, _taps(theirs, x), strict=True):
        assert_near(tap, expected, 1e-10)
    last = after["blocks"][18]["norm"]
    assert_near(last["mean"][...], theirs[18][1].running_mean, 1e-10)
    assert_near(last["var"][...], theirs[18][1].running_var, 1e-10)
