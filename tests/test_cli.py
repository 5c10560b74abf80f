"""The command line: what it prints, and its exit codes."""

import pytest

from fetal_flax import cli


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in cli.COMMANDS)


def test_an_unknown_command_is_bad_input(capsys):
    assert cli.main(["trian"]) == 2
    assert "fetal-flax COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["train", "--schedule.epochs", "0"], "schedule.epochs"),
        (["train", "--data.image-size", "100", "100"], "data.image_size"),
        (["train", "--config", "missing.py"], "missing.py"),
        (["train", "--config", "x" * 300], "File name too long"),
        (["train", "--seed", "99999999999999999999"], "seed must be 0 or more and below 2^32"),
        (["train", "--optimizer.learning-rate", "inf"], "optimizer.learning_rate must be a finite"),
        (["train", "--encoder.weights", "missing.pth"], "missing.pth"),
        (["convert", "--source", "missing.pth", "--output", "out"], "missing.pth"),
        (["evaluate", "--checkpoint", "missing", "--output", "out"], "missing"),
        (["predict", "--checkpoint", "missing", "--input", "x.png", "--output", "out"], "x.png"),
        (["train", "--fold", "5"], "data.fold"),
        (["cross-validate", "--encoder.weights", "missing.pth"], "missing.pth"),
        (["data", "prepare", "--source", "missing"], "missing"),
        (["summary", "--model", "vnet"], "vnet"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(flags, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(flags) == 2
    printed = capsys.readouterr().err
    assert named in printed
    assert "Traceback" not in printed
    assert len(printed.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_flags_override_the_config(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from fetal_flax.config import TrainConfig\ndef config(): return TrainConfig(seed=7)\n"
    )
    flags = ["--config", str(path), "--model.name", "unet", "--loss.pos-weight", "200"]
    command = cli._parse("train", flags)
    assert command.settings.seed == 7
    assert command.settings.model.name == "unet"
    assert command.settings.loss.pos_weight == 200


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
    assert cli.main(["train", "--config", str(path)]) == 2
    printed = capsys.readouterr().err
    assert named in printed and len(printed.splitlines()) == 1


@pytest.mark.parametrize("name", ["phantom", "hc18", "hc18_described", "baseline_unet"])
def test_the_configs_load_and_bear_their_files_name(name):
    assert cli.load_config(cli.CONFIGS / f"{name}.py").name == name


def test_summary_prints_exact_counts(capsys):
    assert cli.main(["summary", "--model", "mobilenet_aspp_se_unet"]) == 0
    printed = capsys.readouterr().out
    for count in ("10,012,177", "7,788,881", "25,253,893", "23,030,597", "2,223,296"):
        assert count in printed


def test_the_headline_is_the_ellipses_and_the_raw_masks_stands_beside_it(capsys, tmp_path):
    names = ("dice", "ellipse_dice", "hc_error_mm", "hausdorff_mm")
    metrics = {name: {"mean": 0.5, "std": 0.25} for name in names}
    run = {"missed": ["a", "b"]}
    cli._print_headline({"n": 3, **metrics, "by": {}, "run": run}, tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:3]] == ["ellipse_dice", "hc_error_mm"]
    assert [line.split()[0] for line in printed[4:6]] == ["dice", "hausdorff_mm"]
    assert (printed[0], printed[3]) == ("ellipse of the mask's largest region:", "raw mask:")
    assert printed[1].split()[1:] == ["0.5000", "±", "0.2500"]
    assert printed[6] == "no head was found in 2 images: a, b"
