"""The scripts in examples/, run on small data."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import pytest

import fetal_flax as ff
from fetal_flax.checkpoints import shipped

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.usefixtures("quick_compilation")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, monkeypatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        script(name).main()  # As people have it.


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        *("measure_scan", "lift_a_block", "fine_tune", "own_training_loop"),
    }


def losses(printed: str) -> list[float]:
    return [float(line.rpartition(" ")[2]) for line in printed.splitlines() if "loss" in line]


def test_a_training_loop_of_ones_own_leaves_a_network_that_measures(tmp_path, monkeypatch, capsys):
    output = tmp_path / "own"
    flags = ("--steps", "4", "--side", "32", "--output", str(output))
    run("own_training_loop", monkeypatch, *flags)
    values = losses(capsys.readouterr().out)
    assert len(values) == 4 and values[-1] < values[0]
    run("measure_scan", monkeypatch, "--checkpoint", str(output))
    printed = capsys.readouterr().out
    assert "a phantom whose head circumference is" in printed and "look at:" in printed


def test_a_scan_is_measured_with_a_shipped_network_or_none_is_named(
    save_network, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    with pytest.raises(SystemExit):
        run("measure_scan", monkeypatch)
    assert "this package ships no network" in capsys.readouterr().err
    config = ff.ModelConfig(name="unet", base_width=1)
    network = ff.Checkpoint(ff.init(config, seed=0), ff.Description("network", config, (32, 48)))
    save_network(tmp_path / "hc18-tiny", network)
    run("measure_scan", monkeypatch)
    assert "look at:" in capsys.readouterr().out


def test_a_lifted_block_learns_and_needs_nothing_else_of_ours(monkeypatch, capsys):
    tree = ast.parse((EXAMPLES / "lift_a_block.py").read_text())
    ours = [
        (node.module, [alias.name for alias in node.names])
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fetal_flax")
    ]
    assert ours == [("fetal_flax.models", ["ResidualSEBlock"])]
    run("lift_a_block", monkeypatch)
    values = losses(capsys.readouterr().out)
    assert values[-1] < 0.5 * values[0]


@pytest.mark.slow
def test_a_network_is_fine_tuned_on_a_folder_and_measured_on_what_was_put_aside(
    tiny_hc18, tmp_path
):
    config = ff.ModelConfig(name="unet", base_width=2)
    begin = ff.Checkpoint(ff.init(config, seed=0), ff.Description("network", config, (32, 48)))
    ff.save_checkpoint(tmp_path / "begin", begin)
    flags = ["--begin", "begin", "--epochs", "2", "--batch-size", "2", "--output", "run"]
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "fine_tune.py", str(tiny_hc18), *flags],
        cwd=tmp_path,
        # One device: six images make no batch for eight.
        env={**os.environ, "XLA_FLAGS": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    before, after = (line for line in ran.stdout.splitlines() if " mm off" in line)
    assert before.startswith("before, on 6 images: Dice 0.")
    told = re.match(r"after, on (\d) images: Dice 0\.", after)
    assert told and 0 < int(told[1]) < 6
    trained = ff.load_checkpoint(tmp_path / "run")
    assert (trained.config, trained.image_size) == (config, (32, 48))
