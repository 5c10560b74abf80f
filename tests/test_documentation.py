"""README and docs/: what they quote of the command line and of the tests is there."""

import re
import shlex
from pathlib import Path

import pytest

from fetal_flax.commands.main import COMMANDS, parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {"python train.py": "fetal-flax train", "python convert_weights.py": "fetal-flax convert"}


def command_lines(page: Path) -> list[str]:
    """Returns the lines of a page's blocks that begin with our command or its scripts."""
    text = re.sub(r"\\\n\s*", " ", page.read_text("utf-8"))
    for script, command in SCRIPTS.items():
        text = text.replace(f"    {script}", f"    {command}")
    return re.findall(r"^ {4}fetal-flax (.+)$", text, re.MULTILINE)


def test_command_lines_are_found():
    assert sum(len(command_lines(page)) for page in PAGES) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_command_lines_can_be_parsed(page, tmp_path, monkeypatch):
    """Against wrong names of flags and values; nothing is run."""
    monkeypatch.chdir(ROOT)
    own = tmp_path / "heads.py"  # As docs/own-data.md tells to write it.
    own.write_text("from fetal_flax.config import TrainConfig as config\n")
    for line in command_lines(page):
        arguments = shlex.split(line.replace("…", ""), comments=True)
        arguments = [str(own) if word == own.name else word for word in arguments]
        name = next(n for n in COMMANDS if arguments[: n.count(" ") + 1] == n.split())
        try:
            parse(name, arguments[name.count(" ") + 1 :])
        except SystemExit:
            pytest.fail(f"{page.name}: fetal-flax {line}")


def test_the_tests_that_inputs_names_are_there():
    rows = re.findall(r"^\|.*\|(.*)\|$", (ROOT / "docs" / "inputs.md").read_text("utf-8"), re.M)
    named = [
        (ROOT / "tests" / file, test)
        for row in rows
        for file, tests in re.findall(r"`([\w/]+\.py)`((?:[:,] `test_\w+`)*)", row)
        for test in re.findall(r"\w+", tests)
    ]
    assert len(named) > 30
    assert [test for file, test in named if f"def {test}(" not in file.read_text("utf-8")] == []
