"""Which settings a run begins with, and that flags override them."""

import dataclasses

import pytest

from fetal_flax import presets
from fetal_flax._util.files import json_bytes
from fetal_flax.commands.main import parse
from fetal_flax.config import TrainConfig, to_dict


@pytest.fixture
def mine(tmp_path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(
        "from fetal_flax.config import TrainConfig\ndef config(): return TrainConfig(seed=7)\n"
    )
    return str(path)


@pytest.mark.parametrize("command", ["train", "cross-validate"])
def test_a_name_takes_the_preset_and_none_takes_phantoms(command):
    assert parse(command, ["hc18_described"]).settings == presets.load("hc18_described")
    assert parse(command, []).settings == presets.load("phantom")


def test_flags_override_the_preset():
    settings = parse("train", ["baseline_unet", "--seed", "3", "--loss.pos-weight", "200"]).settings
    loss = dataclasses.replace(settings.loss, pos_weight=200)
    preset = presets.load("baseline_unet")
    assert settings == dataclasses.replace(preset, seed=3, loss=loss) != preset


def test_flags_override_the_config(mine):
    flags = ["--config", mine, "--model.name", "unet", "--loss.pos-weight", "200"]
    settings = parse("train", flags).settings
    assert settings.seed == 7
    assert settings.model.name == "unet"
    assert settings.loss.pos_weight == 200


def test_a_resumed_run_takes_its_own_settings_unless_others_are_named(tmp_path, mine):
    workdir = tmp_path / "run"
    workdir.mkdir()
    own = TrainConfig(name="own", seed=5)
    (workdir / "config.json").write_bytes(json_bytes(to_dict(own)))
    flags = ["--resume", "--workdir", str(workdir)]
    assert parse("train", flags).settings == own
    assert parse("train", [*flags, "--config", mine]).settings == TrainConfig(seed=7)
    assert parse("train", ["hc18", *flags]).settings == presets.load("hc18")


def test_help_shows_the_presets_own_values(capsys):
    shown = []
    for name in ("phantom", "baseline_unet"):
        with pytest.raises(SystemExit):
            parse("train", [name, "--help"])
        shown.append("(default: fetal_phantom)" in " ".join(capsys.readouterr().out.split()))
    assert shown == [True, False]
