"""Where `encoder.weights` comes from: torchvision's file, a path, a converted directory."""

import hashlib
import io
import urllib.error
import urllib.request
from typing import Any

import jax
import numpy as np
import pytest
import torch

from fetal_flax.config import ModelConfig
from fetal_flax.conversion import encoder_weights
from fetal_flax.conversion.convert import from_torch_file
from fetal_flax.conversion.encoder_weights import load_encoder, read_encoder
from fetal_flax.conversion.reader import read_state_dicts
from fetal_flax.conversion.recognition import grey_stem
from fetal_flax.errors import InputError
from fetal_flax.models import functional
from fetal_flax.models.functional import STEM, Variables
from fetal_flax.parity.reference import create_reference

GREY, RGB = ModelConfig(), ModelConfig(in_channels=3)
FIRST = "features.0.0.weight"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No download succeeds; holds the addresses that were asked for."""
    asked = []

    def refuse(request: Any, **_: Any) -> None:
        asked.append(request.full_url)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked


def _assert_identical(ours: Variables, theirs: Variables) -> None:
    for arrays, others in zip(ours, theirs, strict=True):
        assert arrays.keys() == others.keys()
        for name in arrays:
            assert arrays[name].dtype == others[name].dtype
            np.testing.assert_array_equal(arrays[name], others[name], err_msg=name)


def test_the_real_weights_file_is_covered(shared_dir):
    path = shared_dir / "weights" / "mobilenet_v2_imagenet_dequantised.pth"
    tensors = read_state_dicts(path)[0].tensors
    variables = read_encoder(path, RGB)
    expected = functional.encoder_part(functional.shapes(RGB))
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda a: a.shape, expected)
    np.testing.assert_array_equal(variables.params[STEM], tensors[FIRST].transpose(2, 3, 1, 0))


def test_the_grey_stem_is_the_mean_of_the_rgb_stem(encoder_file, tensors):
    grey, rgb = read_encoder(encoder_file, GREY), read_encoder(encoder_file, RGB)
    assert grey.params[STEM].shape == (3, 3, 1, 32)
    expected = tensors[FIRST].mean(1).transpose(1, 2, 0)
    np.testing.assert_allclose(grey.params[STEM][:, :, 0], expected, rtol=1e-6)
    del grey.params[STEM], rgb.params[STEM]
    _assert_identical(grey, rgb)


def test_a_grey_stem_stays_as_it_is(encoder_state_dict, tmp_path):
    stem = encoder_state_dict[FIRST][:, :1]
    torch.save({**encoder_state_dict, FIRST: stem}, tmp_path / "grey.pth")
    kernel = read_encoder(tmp_path / "grey.pth", GREY).params[STEM]
    np.testing.assert_array_equal(kernel, stem.numpy().transpose(2, 3, 1, 0))
    with pytest.raises(InputError, match=r"0\.0\.weight has shape \(32, 1, 3, 3\), not \(32, 3,"):
        read_encoder(tmp_path / "grey.pth", RGB)


def test_grey_stem_is_a_mean_not_a_sum():
    stem = np.stack([np.full((2, 3, 3), value) for value in (4.0, 5.0, 9.0)], axis=1)
    np.testing.assert_array_equal(grey_stem(stem), np.full((2, 1, 3, 3), 6.0))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_an_rgb_stem_that_holds_no_floats_is_refused_before_its_mean(
    encoder_state_dict, tmp_path, dtype
):
    path = tmp_path / "a.pth"
    torch.save({**encoder_state_dict, FIRST: encoder_state_dict[FIRST].to(dtype)}, path)
    with pytest.raises(InputError, match=r"features\.0\.0\.weight"):
        read_encoder(path, GREY)


@pytest.mark.parametrize("model", [GREY, RGB], ids=["grey", "rgb"])
def test_a_converted_encoder_comes_back_bit_for_bit(encoder_file, tmp_path, model):
    output = tmp_path / "encoder"
    from_torch_file(encoder_file, output, channels=model.in_channels)
    loaded = load_encoder(str(output), model, tmp_path / "cache")
    assert loaded is not None
    _assert_identical(loaded, read_encoder(encoder_file, model))


def test_an_encoder_of_other_channels_is_refused_with_the_way_out(encoder_file, tmp_path):
    from_torch_file(encoder_file, tmp_path / "encoder", channels=3)
    with pytest.raises(InputError, match="--channels 1"):
        load_encoder(str(tmp_path / "encoder"), GREY, tmp_path)


def test_a_whole_networks_file_gives_its_encoder(tmp_path):
    published = ModelConfig(variant="published", aspp_width=32)
    state_dict = create_reference(published).state_dict()
    torch.save(state_dict, tmp_path / "network.pth")
    # The described variant's encoder is the same.
    loaded = load_encoder(str(tmp_path / "network.pth"), GREY, tmp_path)
    assert loaded is not None
    expected = functional.encoder_part(functional.shapes(GREY))
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(lambda a: a.shape, expected)
    for block in (0, 18):
        np.testing.assert_array_equal(
            loaded.params[f"encoder/blocks/{block}/conv/kernel"],
            state_dict[f"encoder.{block}.0.weight"].numpy().transpose(2, 3, 1, 0),
        )
    with pytest.raises(InputError, match=r"network\.pth holds a network for images with 1 channel"):
        load_encoder(str(tmp_path / "network.pth"), RGB, tmp_path)


def test_a_network_without_encoder_is_refused_as_one(tmp_path):
    path = tmp_path / "unet.pth"
    torch.save(create_reference(ModelConfig(name="unet", base_width=1)).state_dict(), path)
    with pytest.raises(InputError, match=r"unet\.pth holds a unet, which has no MobileNetV2"):
        load_encoder(str(path), GREY, tmp_path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_path_that_does_not_exist_is_named(tmp_path, suffix):
    path = tmp_path / f"nowhere{suffix}"
    with pytest.raises(InputError, match=r"encoder\.weights is .*nowhere"):
        load_encoder(str(path), GREY, tmp_path)


def test_none_and_networks_without_encoder_load_nothing(encoder_file, tmp_path):
    assert load_encoder("none", GREY, tmp_path) is None
    assert load_encoder(str(encoder_file), ModelConfig(name="unet"), tmp_path) is None


def test_without_network_the_error_names_the_file_and_the_way_out(no_network, tmp_path):
    with pytest.raises(InputError) as error:
        load_encoder("imagenet1k_v2", GREY, tmp_path)
    message = str(error.value)
    assert "https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth" in message
    assert f"by hand to {tmp_path / 'weights' / 'mobilenet_v2-7ebf99e0.pth'}" in message
    assert no_network == ["https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth"]


@pytest.mark.parametrize("weights", ["imagenet1k_v1", "imagenet1k_v2"])
def test_a_cached_file_with_another_hash_is_not_used(no_network, encoder_file, tmp_path, weights):
    first_digits = encoder_weights.TORCHVISION[weights][:8]
    cached = tmp_path / "weights" / f"mobilenet_v2-{first_digits}.pth"
    cached.parent.mkdir()
    cached.write_bytes(encoder_file.read_bytes())
    with pytest.raises(InputError, match=cached.name):
        load_encoder(weights, GREY, tmp_path)
    assert len(no_network) == 1


def test_a_download_with_another_hash_is_not_used(monkeypatch, encoder_file, tmp_path):
    class Response(io.BytesIO):
        length = None

    content = encoder_file.read_bytes()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Response(content))
    with pytest.raises(InputError, match="SHA-256"):
        load_encoder("imagenet1k_v2", GREY, tmp_path)
    assert not any((tmp_path / "weights").iterdir())


def test_a_cached_file_with_the_right_hash_is_used(monkeypatch, no_network, encoder_file, tmp_path):
    digest = hashlib.sha256(encoder_file.read_bytes()).hexdigest()
    name = f"mobilenet_v2-{digest[:8]}.pth"
    monkeypatch.setitem(encoder_weights.TORCHVISION, "imagenet1k_v2", digest)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / name).write_bytes(encoder_file.read_bytes())
    loaded = load_encoder("imagenet1k_v2", GREY, tmp_path)
    assert loaded is not None
    _assert_identical(loaded, read_encoder(encoder_file, GREY))
    assert not no_network
