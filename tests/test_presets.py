"""Presets: what the files give, how a broken file is named, and that a wheel carries them."""

from pathlib import Path

import pytest

from fetal_flax import presets
from fetal_flax.commands.main import main
from fetal_flax.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


def test_the_presets_are_those_of_the_checkout_and_bear_their_files_name():
    assert presets.FOLDER == ROOT / "configs"
    assert {"phantom", "hc18", "hc18_described", "baseline_unet"} < set(presets.names())
    assert presets.DEFAULT in presets.names()
    for name in presets.names():
        assert presets.load(name).name == name


@pytest.mark.parametrize("name", ["", "hc19", "hc18.py", "../configs/hc18", "configs/hc18.py"])
def test_an_unknown_name_is_answered_with_the_known_ones(name):
    with pytest.raises(InputError) as error:
        presets.load(name)
    assert str(error.value).startswith(f"there is no preset {name}: choose one of ")
    assert all(known in str(error.value) for known in presets.names())


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("import nothing_like_this", "in line 1 (ModuleNotFoundError: No module named"),
        ("x = 1\ndef config(:", "in line 2 (SyntaxError: invalid syntax"),
        ("def config():\n    raise ValueError('a\\nb')", "in line 2 ('ValueError: a\\nb')"),
        ("def config(x): return x", "(TypeError: config() missing"),
        ("def config(): return config()", "in line 1 (RecursionError"),
        ("x = '\0'", "(SyntaxError: source code string cannot contain null bytes"),
        ("config = 3", "has no function config()"),
        ("def config(): return 3", "has no function config()"),
        (
            "from fetal_flax.config import *\ndef config(): return TrainConfig(seed=-1)",
            "setting seed must be 0 or more",
        ),
    ],
)
def test_a_config_file_that_fails_is_named(content, named, capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(content)
    assert main(["train", "--config", str(path)]) == 2
    printed = capsys.readouterr().err
    assert named in printed and len(printed.splitlines()) == 1


@pytest.mark.slow
def test_a_wheel_trains_presets_by_name_anywhere(install_wheel, tmp_path):
    wheel = install_wheel()
    unknown = wheel.run("train", "hc19", cwd=tmp_path)
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert all(name in unknown.stderr for name in presets.names())
    assert wheel.run("--version", cwd=tmp_path).stdout.startswith("fetal-flax ")
    ran = wheel.run("train", "hc18", "--help", cwd=tmp_path)
    assert ran.returncode == 0 and "(default: hc18)" in ran.stdout
    small = ["--model.name", "unet", "--model.base-width", "2", "--data.image-size", "32", "32"]
    data = ["--data.cache-dir", "cache", "--data.workers", "0", "--data.phantom-count", "45"]
    flags = [*small, *data, "--schedule.epochs", "1"]
    ran = wheel.run("train", "phantom", *flags, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "runs" / "phantom" / "metrics.csv").is_file()
