import json

import pytest

from fetal_flax.commands.main import main


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
