import copy
from collections.abc import Iterator
from pathlib import Path

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
from fetal_flax.models.aspp import ASPP
from fetal_flax.models.blocks import DoubleConv, ResidualSEBlock, SqueezeExcite, max_pool
from fetal_flax.models.mobilenet_v2 import TAPS, InvertedResidual, MobileNetV2

QUICK_COMPILATION = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


# The published blocks, as short as they can be; names do not matter here.


class TorchSE(nn.Module):
    def __init__(self, channels: int, bias: bool):
        super().__init__()
        hidden = max(channels // 16, 1)
        self.squeeze = nn.Linear(channels, hidden, bias=bias)
        self.excite = nn.Linear(hidden, channels, bias=bias)

    def forward(self, x):
        weights = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))
        return x * weights[:, :, None, None]


class TorchResidualSE(nn.Module):
    def __init__(self, inputs: int, outputs: int, published: bool):
        super().__init__()
        self.first = torch_conv_norm(inputs, outputs, 3)
        self.second = torch_conv_norm(outputs, outputs, 3)
        self.se = TorchSE(outputs, bias=published)
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else torch_conv_norm(inputs, outputs, 1)
        self.published = published

    def forward(self, x):
        y = self.second(torch.relu(self.first(x)))
        if self.published:
            return torch.relu(self.se(y) + self.shortcut(x))
        return self.se(torch.relu(y)) + self.shortcut(x)


class TorchDoubleConv(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first = torch_conv_norm(inputs, outputs, 3)
        self.second = torch_conv_norm(outputs, outputs, 3)

    def forward(self, x):
        return torch.relu(self.second(torch.relu(self.first(x))))


class TorchASPP(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int):
        super().__init__()
        rates = (6, 12, 18)
        self.point = torch_conv_norm(inputs, width, 1)
        self.atrous = nn.ModuleList([torch_conv_norm(inputs, width, 3, r) for r in rates])
        self.pool_conv = nn.Conv2d(inputs, width, 1, bias=False)
        self.pool_norm = nn.GroupNorm(32, width)
        self.project = torch_conv_norm(5 * width, outputs, 1)

    def forward(self, x):
        pooled = self.pool_norm(self.pool_conv(nn.functional.adaptive_avg_pool2d(x, 1)))
        pooled = nn.functional.interpolate(
            pooled, x.shape[2:], mode="bilinear", align_corners=False
        )
        branches = [self.point(x), *(branch(x) for branch in self.atrous), pooled]
        return torch.relu(self.project(torch.relu(torch.cat(branches, 1))))


def torch_conv_norm(inputs: int, outputs: int, size: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (size // 2)
    conv = nn.Conv2d(inputs, outputs, size, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


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


def arrays_of(part: nn.Module) -> dict[str, torch.Tensor]:
    """A torch layer's arrays in our names and layout."""
    fields = dict(part.named_parameters(recurse=False)) | dict(part.named_buffers(recurse=False))
    fields.pop("num_batches_tracked", None)
    if isinstance(part, nn.Conv2d):
        fields["weight"] = fields["weight"].permute(2, 3, 1, 0)
    if isinstance(part, nn.Linear):
        fields["weight"] = fields["weight"].T
    is_norm = isinstance(part, (nn.BatchNorm2d, nn.GroupNorm))
    names = {"weight": "scale" if is_norm else "kernel", "running_mean": "mean"}
    names["running_var"] = "var"
    return {names.get(name, name): tensor for name, tensor in fields.items()}


def load(ours: nnx.Module, theirs: nn.Module) -> nnx.State:
    """Returns our block's state with the arrays of a torch block whose parts have our names."""
    arrays = {}
    for path, part in theirs.named_modules():
        *above, last = path.split(".")
        if above and isinstance(theirs.get_submodule(".".join(above)), nn.Sequential):
            last = {"0": "conv", "1": "norm"}[last]
        for name, tensor in arrays_of(part).items():
            place = tuple(int(p) if p.isdigit() else p for p in (*above, last, name) if p)
            arrays[place] = jnp.asarray(tensor.detach().numpy())
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

    return jax.jit(forward, compiler_options=QUICK_COMPILATION)(state, jnp.asarray(x))


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


def assert_same_block(ours: nnx.Module, theirs: nn.Module, x: np.ndarray) -> None:
    """Compares outputs in evaluation and training, and the statistics after training."""
    randomised(theirs)
    state = load(ours, theirs)
    for train in (False, True):
        y, after = run(ours, state, x, train=train)
        assert_near(y, theirs.train(train)(torch_map(x)))
    compared = load(ours, theirs)
    for (path, result), (_, reference) in zip(
        nnx.to_flat_state(after), nnx.to_flat_state(compared), strict=True
    ):
        np.testing.assert_allclose(result[...], reference[...], rtol=1e-11, err_msg=str(path))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("channels", [5, 48])
def test_squeeze_excite_is_torchs(channels, bias):
    ours, theirs = SqueezeExcite(channels, bias=bias, rngs=nnx.Rngs(0)), TorchSE(channels, bias)
    x = random_map(2, 4, 6, channels)
    y, _ = run(ours, load(ours, randomised(theirs)), x)
    assert_near(y, theirs(torch_map(x)))


@pytest.mark.parametrize("published", [False, True], ids=["described", "published"])
@pytest.mark.parametrize("inputs", [6, 32])
def test_residual_se_block_is_torchs(inputs, published):
    ours = ResidualSEBlock(
        inputs, 32, relu_after_sum=published, se_bias=published, rngs=nnx.Rngs(0)
    )
    theirs = TorchResidualSE(inputs, 32, published)
    assert_same_block(ours, theirs, random_map(2, 6, 4, inputs))


def test_double_conv_is_torchs():
    ours = DoubleConv(3, 5, rngs=nnx.Rngs(0))
    assert_same_block(ours, TorchDoubleConv(3, 5), random_map(2, 6, 4, 3))


@pytest.mark.parametrize("sides", [(8, 8), (20, 13)])
def test_aspp_without_dropout_is_torchs(sides):
    ours = ASPP(6, 64, 8, dropout=0, rngs=nnx.Rngs(0))
    assert_same_block(ours, TorchASPP(6, 64, 8), random_map(2, *sides, 6))


def test_aspp_drops_out_after_the_projection_in_training_only():
    ours = ASPP(6, 32, 64, dropout=0.5, rngs=nnx.Rngs(0))
    theirs = randomised(TorchASPP(6, 32, 64))
    state, x = load(ours, theirs), random_map(4, 8, 8, 6)
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
    return [maps[i] for i in TAPS]


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
    for tap, reference in zip(taps, _taps(features.eval(), x), strict=True):
        assert_near(tap, reference, 1e-10)
    unchanged = jax.tree.map(lambda a, b: (a == b).all(), after, state)
    assert all(jax.tree.leaves(unchanged))


@pytest.mark.slow
def test_mobilenet_in_training_is_torchvisions_statistics_included(encoder):
    ours, state, features = encoder
    theirs = copy.deepcopy(features).train()
    x = np.random.default_rng(1).uniform(size=(2, 64, 64, 3))
    taps, after = run(ours, state, x, train=True)
    for tap, reference in zip(taps, _taps(theirs, x), strict=True):
        assert_near(tap, reference, 1e-10)
    last = after["blocks"][18]["norm"]
    assert_near(last["mean"][...], theirs[18][1].running_mean, 1e-10)
    assert_near(last["var"][...], theirs[18][1].running_var, 1e-10)
