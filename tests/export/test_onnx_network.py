"""ONNX models compute what the networks do."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

from fetal_flax.checkpoints import Checkpoint
from fetal_flax.config import ModelConfig
from fetal_flax.errors import InputError
from fetal_flax.export import onnx_model
from fetal_flax.export.settings import ExportSettings
from fetal_flax.models import functional

pytestmark = pytest.mark.usefixtures("quick_compilation")

UNET = ModelConfig(name="unet", base_width=4)
COMPACT = ModelConfig(variant="compact")
NETWORKS = [
    UNET,
    *(
        pytest.param(config, marks=pytest.mark.slow)
        for config in (
            COMPACT,
            ModelConfig(name="mobilenet_unet"),
            ModelConfig(variant="described", in_channels=3),
            ModelConfig(variant="published"),
        )
    ),
]


def images(count: int, channels: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, channels, height, width), dtype=np.uint8)


def run(model: onnx.ModelProto, batch: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (logits,) = session.run(["logits"], {"image": batch})
    return np.asarray(logits)


def expected(checkpoint: Checkpoint, batch: np.ndarray) -> np.ndarray:
    scaled = jnp.asarray(batch.transpose(0, 2, 3, 1).astype(np.float32) / 255)
    apply = jax.jit(functional.apply, static_argnums=0)
    logits = apply(checkpoint.config, checkpoint.variables, scaled)
    return np.asarray(logits).transpose(0, 3, 1, 2)


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest, as a share of how far the logits spread."""
    assert found.shape == wanted.shape and found.dtype == np.float32
    return float(np.abs(found - wanted).max() / np.ptp(wanted))


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.title)
def test_every_network_has_the_same_logits(config, trained_like):
    checkpoint = trained_like(config, (64, 96))
    batch = images(2, config.in_channels, 64, 96)
    found = run(onnx_model(checkpoint), batch.astype(np.float32) / 255)
    assert difference(found, expected(checkpoint, batch)) < 1e-4


@pytest.mark.parametrize(
    "config",
    [UNET, pytest.param(COMPACT, marks=pytest.mark.slow)],
    ids=lambda config: config.title,
)
def test_height_and_width_can_be_free(config, trained_like):
    checkpoint = trained_like(config, (64, 64))
    model = onnx_model(checkpoint, ExportSettings(free_size=True, input_dtype="uint8"))
    for shape in ((1, 1, 64, 64), (3, 1, 96, 128)):
        batch = images(*shape)
        assert difference(run(model, batch), expected(checkpoint, batch)) < 1e-4


def test_a_fixed_size_is_the_only_one_but_the_batch_is_free(trained_like):
    model = onnx_model(trained_like(UNET, (32, 48)))
    for count in (1, 3):
        assert run(model, np.zeros((count, 1, 32, 48), np.float32)).shape == (count, 1, 32, 48)
    with pytest.raises(Exception, match="invalid dimensions"):
        run(model, np.zeros((1, 1, 48, 48), np.float32))


def test_taps_that_read_padding_alone_are_dropped_at_a_fixed_size(trained_like):
    checkpoint = trained_like(COMPACT, (64, 64))
    sizes = {}
    for free_size in (False, True):
        model = onnx_model(checkpoint, ExportSettings(free_size=free_size))
        (kernel,) = (
            array
            for array in model.graph.initializer
            if array.name == "aspp/atrous/2/conv/depthwise/kernel"
        )
        sizes[free_size] = [*kernel.dims[2:]]
    assert sizes == {False: [1, 1], True: [3, 3]}


def test_float16_halves_the_file_and_keeps_float32_outside(trained_like):
    checkpoint = trained_like(UNET, (64, 96))
    half = onnx_model(checkpoint, ExportSettings(precision="float16"))
    assert half.ByteSize() < 0.6 * onnx_model(checkpoint).ByteSize()
    batch = images(2, 1, 64, 96)
    apart = difference(run(half, batch.astype(np.float32) / 255), expected(checkpoint, batch))
    assert 1e-5 < apart < 2e-2


def test_the_model_says_what_it_is(trained_like):
    model = onnx_model(trained_like(UNET, (32, 48)))
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert said.keys() == {"network", "model", "image_size", "dataset", "outline_px", "sha256"}
    assert said["network"] == "unet"
    assert json.loads(said["model"])["base_width"] == 4
    assert json.loads(said["image_size"]) == [32, 48]
    assert (said["dataset"], said["outline_px"]) == ("hc18", "1.4")
    other = {
        entry.key: entry.value for entry in onnx_model(trained_like(UNET, (32, 48))).metadata_props
    }
    assert said == other and len(said["sha256"]) == 64
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 18)]


def test_a_missing_package_is_one_sentence(trained_like, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs onnx: .* pip install 'fetal_flax\[onnx\]'"):
        onnx_model(trained_like(UNET, (32, 48)))
