"""Presets: what the files give, and how a broken file is named."""

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
