"""The command, its report and its errors."""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fetal_flax.commands.main import main
from fetal_flax.config import ModelConfig
from fetal_flax.conversion import convert
from fetal_flax.parity import reference

pytestmark = pytest.mark.usefixtures("quick_compilation")
MODEL = ModelConfig(name="unet", base_width=4)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    network = reference.create_reference(MODEL)
    reference.randomise_norms(network, 0)
    path = tmp_path_factory.mktemp("reference") / "unet.pth"
    torch.save({"model_state_dict": network.state_dict()}, path)
    return path


@pytest.fixture
def parity(file, tmp_path):
    """Runs the command on the small reference; returns its exit code."""

    def run(*flags: str, reference: Path = file) -> int:
        small = ["--image-size", "32", "48", "--batch-size", "2", "--steps", "2"]
        where = ["--cache-dir", str(file.parent / "cache"), "--output", str(tmp_path / "report")]
        return main(["parity", "--reference", str(reference), *small, *where, *flags])

    return run


def test_the_report_says_what_was_compared_and_found(parity, tmp_path, capsys):
    assert parity("--randomise-norms") == 0
    text = (tmp_path / "report" / "parity.md").read_text()
    assert text in capsys.readouterr().out
    for part in (
        "# Parity with PyTorch: unet",
        "**Agrees.**",
        "`unet.pth`, SHA-256",
        "norms redrawn at random",
        "4 in batches of 2 at 32×48: phantom_000000",
        f"torch {torch.__version__.split('+')[0]}",
        "## float64",
        "## float32",
        "| stage4/block | `up1.conv.double_conv` | 2×4×6×32 |",
        "The error jumps nowhere",
        "| mask, pixels that differ |",
        "| gradients of |",
        "Flax from float64",
        "| updated statistics of |",
        "| 2 | ",
    ):
        assert part in text, part
    report = json.loads((tmp_path / "report" / "parity.json").read_text())
    assert report["agrees"] is True and report["failures"] == []
    assert [c["precision"] for c in report["comparisons"]] == ["float64", "float32"]
    exact = report["comparisons"][0]
    assert len(exact["steps"]) == 2 and exact["stages"][-1]["stage"] == "head"
    assert exact["logits_over_std"] < 1e-10


def test_images_of_hc18_are_taken_on_request(parity, tiny_hc18, tmp_path):
    flags = ("--data-dir", str(tiny_hc18), "--precisions", "float32", "--steps", "0")
    assert parity(*flags) == 0
    text = (tmp_path / "report" / "parity.md").read_text()
    assert "000_HC, 001_2HC, 002_HC, 003_HC" in text
    assert "## float64" not in text and "| step |" not in text


def test_a_converted_directory_is_compared_and_a_damaged_one_found(parity, file, tmp_path, capsys):
    convert.from_torch_file(file, tmp_path / "converted")
    flags = ("--precisions", "float32", "--steps", "0", "--checkpoint")
    assert parity(*flags, str(tmp_path / "converted")) == 0

    state = torch.load(file, weights_only=True)["model_state_dict"]
    state["up2.up.weight"] = state["up2.up.weight"].flip(2, 3)
    torch.save(state, tmp_path / "flipped.pth")
    convert.from_torch_file(tmp_path / "flipped.pth", tmp_path / "other")
    capsys.readouterr()
    assert parity(*flags, str(tmp_path / "other")) == 1
    printed = capsys.readouterr()
    assert "**Does not agree.**" in printed.out
    assert "The error jumps at **stage3/up**" in printed.out
    assert "stage stage3/up is off by" in printed.err
    assert json.loads((tmp_path / "report" / "parity.json").read_text())["agrees"] is False


def test_a_checkpoint_of_another_network_is_refused(parity, tmp_path, capsys):
    torch.save(
        reference.create_reference(ModelConfig(name="unet", base_width=8)).state_dict(),
        tmp_path / "wide.pth",
    )
    convert.from_torch_file(tmp_path / "wide.pth", tmp_path / "converted")
    assert parity("--checkpoint", str(tmp_path / "converted")) == 2
    assert "the reference another network: convert the reference again" in capsys.readouterr().err


@pytest.mark.slow
def test_safetensors_are_read(parity, file, tmp_path):
    state = torch.load(file, weights_only=True)["model_state_dict"]
    safetensors.torch.save_file(state, tmp_path / "unet.safetensors")
    flags = ("--precisions", "float32", "--steps", "0")
    assert parity(*flags, reference=tmp_path / "unet.safetensors") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "0"], "setting batch_size must be at least 1"),
        (["--image-size", "40", "48"], "data.image_size must be multiples of 16 for unet"),
    ],
)
def test_bad_settings_are_named_and_nothing_is_written(parity, flags, message, tmp_path, capsys):
    assert parity(*flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_too_few_images_are_named(parity, tiny_hc18, capsys):
    assert parity("--data-dir", str(tiny_hc18), "--batches", "4") == 2
    assert "holds 6 images, and 8 are to be compared" in capsys.readouterr().err


def test_without_torch_the_way_out_is_named(monkeypatch, parity, capsys):
    for name in [name for name in sys.modules if name.startswith("fetal_flax.parity.")]:
        if not name.endswith("settings"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delattr("fetal_flax.parity.report", raising=False)
    monkeypatch.delattr("fetal_flax.parity.run", raising=False)
    assert parity() == 2
    assert "parity needs torch: install it with pip install" in capsys.readouterr().err
