"""Files are written, measured, and kept only if they are right."""

import os
import subprocess
import sys

import cv2
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

from fetal_flax.commands.main import main
from fetal_flax.config import ModelConfig
from fetal_flax.errors import InputError
from fetal_flax.export import ExportSettings, export, onnx_network, to_file
from fetal_flax.export.quantization import quantize
from fetal_flax.models import functional

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        ("onnx", "uint8"),
        ("stablehlo", "float32"),
        pytest.param("onnx", "float32", marks=pytest.mark.slow),
        pytest.param("stablehlo", "uint8", marks=pytest.mark.slow),
    ],
)
def test_a_file_is_written_and_agrees(format, dtype, threshold_network, bright_heads, tmp_path):
    output = tmp_path / "made" / "network"
    report = to_file(
        threshold_network,
        output,
        format=format,
        settings=ExportSettings(input_dtype=dtype),
        data_dir=bright_heads,
    )
    assert [*output.parent.iterdir()] == [output]
    assert report.size_bytes == output.stat().st_size
    (comparison,) = report.comparisons.values()
    assert comparison.images == 6  # There are no more.
    assert comparison.differing_pixels == 0
    assert comparison.circumference_change == (0, 0)


def test_the_command_prints_the_comparison(
    threshold_network, save_network, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)  # A short path: longer lines are broken.
    save_network(tmp_path / "run", threshold_network)
    output = "network.onnx"
    flags = ["--checkpoint", "run", "--output", output, "--images", "2"]
    assert main(["export", *flags, "--free-size"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("pixels that differ") == 2
    assert "2 phantoms at 64×96" in printed and "2 phantoms at 80×128" in printed
    assert f"MB are in {output}" in printed


def test_a_network_in_bfloat16_is_written_in_float32(trained_like, tmp_path):
    checkpoint = trained_like(ModelConfig(name="unet", base_width=2, dtype="bfloat16"), (32, 32))
    report = to_file(checkpoint, tmp_path / "network.onnx", images=1)
    assert report.comparisons[32, 32].differing_pixels == 0
    said = {p.key: p.value for p in onnx.load(tmp_path / "network.onnx").metadata_props}
    assert '"dtype": "float32"' in said["model"]


@pytest.mark.parametrize("before", [None, b"an older file"])
def test_what_is_beyond_a_limit_leaves_nothing(
    before, threshold_network, bright_heads, tmp_path, monkeypatch
):
    output = tmp_path / "network.onnx"
    if before:
        output.write_bytes(before)
    monkeypatch.setattr(
        export, "onnx_model", lambda *arguments: biased(onnx_network.onnx_model(*arguments))
    )
    with pytest.raises(InputError, match=r"network\.onnx would be too far .* logits differ by"):
        to_file(threshold_network, output, data_dir=bright_heads)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([before] if before else [])


def biased(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with another bias of its head."""
    (bias,) = (array for array in model.graph.initializer if array.name == "head/bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(1, -18, np.float32), bias.name))
    return model


def test_int8_is_a_quarter_and_close(trained_like, threshold_network, bright_heads, tmp_path):
    settings = ExportSettings(quantize="int8", calibration=bright_heads)
    report = to_file(
        threshold_network, tmp_path / "int8.onnx", settings=settings, data_dir=bright_heads
    )
    (comparison,) = report.comparisons.values()
    assert comparison.logit_difference > 1e-3  # It is quantised.
    assert comparison.dice[1] > 0.97
    model = onnx.load(tmp_path / "int8.onnx")
    kinds = {node.op_type for node in model.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert {p.key: p.value for p in model.metadata_props}["network"] == "unet"

    whole = onnx_network.onnx_model(trained_like(ModelConfig(name="unet", base_width=16), (32, 32)))
    quantize(whole, [np.zeros((1, 1, 32, 32), np.float32)], tmp_path / "wide.onnx")
    assert os.path.getsize(tmp_path / "wide.onnx") < 0.3 * whole.ByteSize()


@pytest.mark.slow
def test_stablehlo_runs_in_a_process_that_knows_jax_alone(trained_like, tmp_path):
    checkpoint = trained_like(ModelConfig(name="unet", base_width=4), (64, 96))
    output = tmp_path / "network.stablehlo"
    to_file(checkpoint, output, format="stablehlo", images=2)
    images = np.random.default_rng(0).random((3, 64, 96, 1), np.float32)
    np.save(tmp_path / "images.npy", images)
    code = (
        "import sys; sys.modules.update(flax=None, fetal_flax=None); import pathlib, numpy as np, "
        "jax.export; f = jax.export.deserialize(pathlib.Path('network.stablehlo').read_bytes()); "
        "np.save('logits.npy', f.call(np.load('images.npy'))); print(*f.platforms)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["cpu", "cuda", "tpu"]
    logits = functional.apply(checkpoint.config, checkpoint.variables, jnp.asarray(images))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hc18-compact", "hc18-described"])
def test_the_shipped_networks_agree_on_scans(name, shared_dir, tmp_path):
    settings = ExportSettings(input_dtype="uint8")
    report = to_file(
        name, tmp_path / "network.onnx", settings=settings, data_dir=shared_dir / "hc18"
    )
    (comparison,) = report.comparisons.values()
    assert comparison.images == 20
    assert comparison.logit_difference < 2e-4
    assert comparison.differing_pixels <= 2


# Bad input.


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--format", "stablehlo", "--free-size"], "--free-size is for --format onnx alone"),
        (["--format", "stablehlo", "--precision", "float16"], "--precision float16 is for"),
        (["--quantize", "int8"], "int8 needs --calibration FOLDER"),
        (["--calibration", "x"], "--calibration is for --quantize int8 alone"),
        (
            ["--quantize", "int8", "--calibration", "x", "--precision", "float16"],
            "starts from float32: leave --precision out",
        ),
        (["--images", "0"], "--images must be at least 1"),
        (["--data-dir", "nowhere"], "--data-dir nowhere doesn't exist"),
        (
            ["--quantize", "int8", "--calibration", "nowhere"],
            "--calibration nowhere doesn't exist",
        ),
        (
            ["--format", "web"],
            "network.onnx would be web, but .onnx is what files of",
        ),
        (["--output", "measure.HTML"], "measure.HTML would be onnx, but .html is"),
        (["--output", "network.tflite"], "LiteRT, which isn't written here"),
        (["--output", "run"], "can't write run, which is a folder or device: name a file"),
        (["--output", "."], "can't write ., which is a folder"),
        (["--output", "/dev/null"], "can't write /dev/null, which is a folder or device"),
    ],
)
def test_bad_flags_are_one_sentence(
    flags, sentence, threshold_network, save_network, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    save_network(tmp_path / "run", threshold_network)
    command = ["export", "--checkpoint", "run", "--output", "network.onnx", "--images", "1"]
    assert main([*command, *flags]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fetal-flax export: ") and printed.count("\n") == 1
    assert sentence in printed
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_image_that_is_none_or_too_small_is_named(threshold_network, tmp_path):
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"0\.png is not an image"):
        to_file(threshold_network, tmp_path / "network.onnx", data_dir=tmp_path)
    cv2.imwrite(str(tmp_path / "0.png"), np.zeros((1, 40), np.uint8))
    with pytest.raises(InputError, match=r"0\.png has 40×1 pixels, too few"):
        to_file(threshold_network, tmp_path / "network.onnx", data_dir=tmp_path)


def test_an_output_that_cannot_be_written_is_named(threshold_network, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"can't write .*network\.onnx"):
        to_file(threshold_network, tmp_path / "file" / "network.onnx", images=1)
