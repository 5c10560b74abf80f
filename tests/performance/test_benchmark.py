import json

import jax
import pytest

from fetal_flax.commands.main import main
from fetal_flax.config import ModelConfig
from fetal_flax.models import functional
from fetal_flax.performance import benchmark
from fetal_flax.performance.machine import Machine

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.slow
def test_the_figures_fit_together(tmp_path, capsys):
    path = tmp_path / "benchmark.json"
    flags = ["--model.name", "unet", "--model.base-width", "4", "--image-size", "32", "32"]
    flags += ["--inference-batches", "1", "3", "--training-batch", "8", "--repeats", "3"]
    assert main(["benchmark", *flags, "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert (report["network"], report["image_size"]) == ("unet", [32, 32])
    assert report["machine"]["devices"] == 8 and report["peak_bytes"] > 1e6
    assert report["machine"]["product_flops"] > 1e8 and report["machine"]["copy_bytes"] > 1e8
    timings = report["timings"]
    assert [timing["devices"] for timing in timings] == [1, 1, 8]
    assert [(timing["name"], timing["batch_size"]) for timing in timings] == [
        ("inference", 1),
        ("inference", 3),
        ("training", 8),
    ]
    for timing in timings:
        low, high = timing["quartiles"]
        assert 0 < low <= timing["seconds"] <= high
        assert timing["images_per_second"] == pytest.approx(
            timing["batch_size"] / timing["seconds"]
        )
        assert timing["compile_seconds"] > 0 and 0 < timing["roofline_share"] < 1
        assert f"{timing['images_per_second']:.1f}" in printed


def test_a_batch_that_devices_cannot_share_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr("fetal_flax.performance.machine._COPY_BYTES", 2**12)
    monkeypatch.setattr("fetal_flax.performance.machine._PRODUCT_SIDE_ON_CPU", 16)
    flags = ["--inference-batches", "--training-batch", "12", "--repeats", "1"]
    assert main(["benchmark", "--model.name", "unet", *flags]) == 2
    assert "8 devices" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--inference-batches", "--training-batch", "--repeats"])
def test_nothing_can_be_measured_less_than_once(flag, capsys):
    assert main(["benchmark", "--model.name", "unet", flag, "0"]) == 2
    assert f"{flag} must be at least 1, not 0" in capsys.readouterr().err


def test_inference_is_weighed_by_the_one_device_that_does_it(monkeypatch):
    monkeypatch.setattr(benchmark, "repeat", lambda *_: [2.0])
    machine = Machine("", 8, "", "", product_flops=100.0, copy_bytes=1e30)
    model = ModelConfig(name="unet", base_width=4)
    inference = benchmark._inference(model, functional.init(model, 0), (32, 32), 3)
    timing = benchmark._measure(inference, 3, 40, machine, 1)
    assert len(jax.devices()) == 8 and timing.devices == 1
    assert timing.roofline_share == pytest.approx(3 * 40 / 100 / 2)
