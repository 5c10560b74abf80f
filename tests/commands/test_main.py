"""The command line: what it prints, and its exit codes."""

import importlib.metadata
import subprocess
import sys

import pytest

from fetal_flax.commands.main import COMMANDS, main


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


def test_help_before_a_command_is_the_list_of_commands(capsys):
    assert main(["--help", "train"]) == 0
    assert capsys.readouterr().out.startswith("usage: fetal-flax COMMAND")


def test_help_fits_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert {line[2:16].strip() for line in lines} >= {*COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert printed.startswith(f"usage: fetal-flax {name} ")
    assert " ".join(COMMANDS[name].__doc__.split()[:4]) in printed
    assert len(COMMANDS[name].__doc__) <= 80  # It isn't wrapped.


@pytest.mark.parametrize("flags", [["--help"], ["train", "--help"], ["--version"]])
def test_help_does_not_wait_for_jax(flags):
    slow = ("jax", "flax", "orbax", "tensorflow_datasets", "cv2", "numpy")
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in slow)
    code = f"import sys; {blocked}from fetal_flax.commands.main import main; sys.exit(main())"
    ran = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_python_m_is_the_command():
    run = [sys.executable, "-m", "fetal_flax", "--version"]
    ran = subprocess.run(run, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"fetal-flax {importlib.metadata.version('fetal_flax')}\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("trian", "there is no command trian; did you mean train?"),
        ("data", "there is no command data; did you mean data prepare?"),
        ("Evaluate", "there is no command Evaluate; did you mean evaluate?"),
        ("version", "there is no command version"),
        ("", "there is no command ''"),
        ("a\nb", "there is no command 'a\\nb'"),
        ("--checkpoint", "the command comes first, then flags like --checkpoint"),
    ],
)
def test_an_unknown_command_is_bad_input(given, said, capsys):
    assert main([given]) == 2
    usage, _, last = capsys.readouterr().err.strip().rpartition("\n")
    assert "fetal-flax COMMAND" in usage and last == f"fetal-flax: {said}"


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
        (["train", "hc19"], "choose one of baseline_mobilenet_unet, baseline_unet, hc18, "),
        (["train", "a\nb"], "no preset 'a\\nb'"),
        (["train", "hc18", "--config", "mine.py"], "name or --config, not both"),
        (["train", "--seed", "3", "hc18"], "hc18 is no flag's value"),
        (["train", "--seed", "3", "4"], "4 is no flag's value"),
        (["train", ""], "there is no preset"),
        (["convert", "--source", "missing.pth", "--output", "out"], "missing.pth"),
        (["evaluate", "--checkpoint", "missing", "--output", "out"], "missing"),
        (["predict", "--checkpoint", "missing", "--input", "x.png", "--output", "out"], "missing"),
        (["predict", "--input", "x.png", "--output", "out"], "x.png"),
        (["train", "--fold", "5"], "data.fold"),
        (["cross-validate", "--encoder.weights", "missing.pth"], "missing.pth"),
        (["cross-validate", "hc19"], "no preset hc19"),
        (["data", "prepare", "--source", "missing"], "missing"),
        (["summary", "--model", "vnet"], "vnet"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(flags, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    printed = capsys.readouterr().err
    assert named in printed
    assert "Traceback" not in printed
    assert len(printed.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
