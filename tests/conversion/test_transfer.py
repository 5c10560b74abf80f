import hashlib
import io
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import torchvision

from fetal_flax import checkpoints
from fetal_flax.config import ModelConfig
from fetal_flax.conversion import encoder_weights
from fetal_flax.conversion.convert import convert
from fetal_flax.conversion.encoder_weights import load_encoder, read_encoder
from fetal_flax.conversion.tables import IGNORED, MOBILENET_V2
from fetal_flax.conversion.torch_file import read_state_dict
from fetal_flax.conversion.transfer import grey_stem, transfer
from fetal_flax.errors import InputError
from fetal_flax.models import functional
from fetal_flax.models.functional import STEM, Variables

GREY, RGB = ModelConfig(), ModelConfig(in_channels=3)


@pytest.fixture(scope="module")
def state_dict() -> dict[str, torch.Tensor]:
    """torchvision's, with no two arrays alike."""
    generator = torch.Generator().manual_seed(0)
    tensors = torchvision.models.mobilenet_v2().state_dict()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1, generator=generator)
    return tensors


@pytest.fixture(scope="module")
def file(state_dict, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("torchvision") / "mobilenet_v2.pth"
    torch.save(state_dict, path)
    return path


@pytest.fixture
def tensors(state_dict) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in state_dict.items()}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No download succeeds; holds the addresses that were asked for."""
    asked = []

    def refuse(request: Any, **_: Any) -> None:
        asked.append(request.full_url)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked


def _expected(model: ModelConfig) -> Variables:
    return functional.encoder_part(functional.shapes(model))


def _transfer(tensors: dict[str, np.ndarray], model: ModelConfig) -> Variables:
    return transfer(tensors, MOBILENET_V2, _expected(model), source="FILE")


def _assert_identical(ours: Variables, theirs: Variables) -> None:
    for arrays, others in zip(ours, theirs, strict=True):
        assert arrays.keys() == others.keys()
        for name in arrays:
            assert arrays[name].dtype == others[name].dtype
            np.testing.assert_array_equal(arrays[name], others[name], err_msg=name)


def test_every_tensor_of_torchvision_arrives_once(tensors):
    assert len(tensors) == 314
    variables = _transfer(tensors, RGB)
    arrived = variables.params | variables.batch_stats
    kept = {name: a for name, a in tensors.items() if not IGNORED.fullmatch(name)}
    assert len(kept) == len(arrived) == 260
    # No two tensors have the same sum.
    before, after = (
        sorted(np.asarray(a).sum(dtype=float) for a in side.values()) for side in (kept, arrived)
    )
    np.testing.assert_allclose(after, before, rtol=1e-12)


def test_layouts_and_fields_are_ours(tensors):
    variables = _transfer(tensors, RGB)
    block, norm = "encoder/blocks/3", "features.3.conv.1.1"
    depthwise = tensors["features.3.conv.1.0.weight"]
    kernel = variables.params[f"{block}/depthwise/conv/kernel"]
    np.testing.assert_array_equal(kernel[:, :, 0], depthwise[:, 0].transpose(1, 2, 0))
    for ours, theirs in {"scale": "weight", "bias": "bias"}.items():
        np.testing.assert_array_equal(
            variables.params[f"{block}/depthwise/norm/{ours}"], tensors[f"{norm}.{theirs}"]
        )
    for field in ("mean", "var"):
        np.testing.assert_array_equal(
            variables.batch_stats[f"{block}/depthwise/norm/{field}"],
            tensors[f"{norm}.running_{field}"],
        )


def test_the_real_weights_file_is_covered(shared_dir):
    path = shared_dir / "weights" / "mobilenet_v2_imagenet_dequantised.pth"
    tensors = read_state_dict(path)
    variables = read_encoder(path, RGB)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda a: a.shape, _expected(RGB))
    np.testing.assert_array_equal(
        variables.params[STEM], tensors["features.0.0.weight"].transpose(2, 3, 1, 0)
    )


def test_all_problems_are_listed_at_once(tensors):
    del tensors["features.2.conv.2.weight"]
    tensors["features.19.0.weight"] = np.zeros((4, 4, 1, 1), np.float32)
    tensors["head.scale"] = np.zeros(3, np.float32)
    tensors["features.3.conv.3.bias"] = np.zeros(25, np.float32)
    tensors["features.4.conv.3.bias"][7] = np.nan
    tensors["features.4.conv.3.weight"][7] = np.inf
    integers = tensors["features.5.conv.3.bias"].astype(np.int32)
    tensors["features.5.conv.3.bias"] = integers
    tensors["features.6.conv.3.bias"] = tensors["features.6.conv.3.bias"][None]
    with pytest.raises(InputError) as error:
        _transfer(tensors, RGB)
    message = str(error.value)
    for problem in (
        "FILE",
        "missing encoder/blocks/2/project/conv/kernel",
        "surplus features.19.0.weight",
        "surplus head.scale",
        "encoder/blocks/3/project/norm/bias has shape (25,), not (24,)",
        "encoder/blocks/4/project/norm/bias holds values that are not finite",
        "encoder/blocks/4/project/norm/scale holds values that are not finite",
        "encoder/blocks/5/project/norm/bias holds int32, not floats",
        "features.6.conv.3.bias",
        "missing encoder/blocks/6/project/norm/bias",
    ):
        assert problem in message


def test_a_name_that_only_contains_a_known_one_is_surplus(tensors):
    tensors["ema.features.0.0.weight"] = tensors["features.0.0.weight"]
    with pytest.raises(InputError, match=r"surplus ema\.features\.0\.0\.weight"):
        _transfer(tensors, RGB)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_become_float32(tensors, dtype):
    tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    variables = _transfer(tensors, RGB)
    assert {a.dtype for arrays in variables for a in arrays.values()} == {np.dtype(np.float32)}


def test_the_grey_stem_is_the_mean_of_the_rgb_stem(tensors):
    grey, rgb = _transfer(tensors, GREY), _transfer(tensors, RGB)
    assert grey.params[STEM].shape == (3, 3, 1, 32)
    expected = tensors["features.0.0.weight"].mean(1).transpose(1, 2, 0)
    np.testing.assert_allclose(grey.params[STEM][:, :, 0], expected, rtol=1e-6)
    del grey.params[STEM], rgb.params[STEM]
    _assert_identical(grey, rgb)


def test_a_grey_stem_stays_as_it_is(tensors):
    stem = tensors["features.0.0.weight"][:, :1]
    tensors["features.0.0.weight"] = stem
    kernel = _transfer(tensors, GREY).params[STEM]
    np.testing.assert_array_equal(kernel, stem.transpose(2, 3, 1, 0))
    with pytest.raises(InputError, match=r"encoder/blocks/0/conv/kernel has shape"):
        _transfer(tensors, RGB)


def test_grey_stem_is_a_mean_not_a_sum():
    assert grey_stem(np.full((3, 3, 3, 2), 5.0)).max() == 5


@pytest.mark.parametrize("model", [GREY, RGB], ids=["grey", "rgb"])
def test_a_converted_encoder_comes_back_bit_for_bit(file, tmp_path, model):
    output = tmp_path / "encoder"
    convert(file, output, channels=model.in_channels)
    loaded = load_encoder(str(output), model, tmp_path / "cache")
    assert loaded is not None
    _assert_identical(loaded, read_encoder(file, model))


def test_conversion_refuses_to_overwrite(file, tmp_path):
    convert(file, tmp_path / "encoder")
    with pytest.raises(InputError, match="already holds a checkpoint: choose another --output"):
        convert(file, tmp_path / "encoder")


def test_conversion_of_another_network_leaves_nothing(tmp_path):
    path, output = tmp_path / "resnet.pth", tmp_path / "encoder"
    torch.save({"conv1.weight": torch.zeros(4, 3, 7, 7)}, path)
    with pytest.raises(InputError, match=r"resnet\.pth doesn't fit the network"):
        convert(path, output)
    assert not checkpoints.exists(output)


def test_an_encoder_of_other_channels_is_refused_with_the_way_out(file, tmp_path):
    convert(file, tmp_path / "encoder", channels=3)
    with pytest.raises(InputError, match="--channels 1"):
        load_encoder(str(tmp_path / "encoder"), GREY, tmp_path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_path_that_does_not_exist_is_named(tmp_path, suffix):
    path = tmp_path / f"nowhere{suffix}"
    with pytest.raises(InputError, match=r"encoder\.weights is .*nowhere"):
        load_encoder(str(path), GREY, tmp_path)


def test_none_and_networks_without_encoder_load_nothing(file, tmp_path):
    assert load_encoder("none", GREY, tmp_path) is None
    assert load_encoder(str(file), ModelConfig(name="unet"), tmp_path) is None


def test_without_network_the_error_names_the_file_and_the_way_out(no_network, tmp_path):
    with pytest.raises(InputError) as error:
        load_encoder("imagenet1k_v2", GREY, tmp_path)
    message = str(error.value)
    assert "https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth" in message
    assert f"by hand to {tmp_path / 'weights' / 'mobilenet_v2-7ebf99e0.pth'}" in message
    assert no_network == ["https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth"]


@pytest.mark.parametrize("weights", ["imagenet1k_v1", "imagenet1k_v2"])
def test_a_cached_file_with_another_hash_is_not_used(no_network, file, tmp_path, weights):
    cached = tmp_path / "weights" / encoder_weights.TORCHVISION[weights]
    cached.parent.mkdir()
    cached.write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=cached.name):
        load_encoder(weights, GREY, tmp_path)
    assert len(no_network) == 1


def test_a_download_with_another_hash_is_not_used(monkeypatch, file, tmp_path):
    class Response(io.BytesIO):
        length = None

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Response(file.read_bytes()))
    with pytest.raises(InputError, match="SHA-256"):
        load_encoder("imagenet1k_v2", GREY, tmp_path)
    assert not any((tmp_path / "weights").iterdir())


def test_a_cached_file_with_the_right_hash_is_used(monkeypatch, no_network, file, tmp_path):
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    name = f"mobilenet_v2-{digest}.pth"
    monkeypatch.setitem(encoder_weights.TORCHVISION, "imagenet1k_v2", name)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / name).write_bytes(file.read_bytes())
    loaded = load_encoder("imagenet1k_v2", GREY, tmp_path)
    assert loaded is not None
    _assert_identical(loaded, read_encoder(file, GREY))
    assert not no_network
