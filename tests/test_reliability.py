"""The campaign of reliability/fuzz.py, in short, so that it can be run when it is needed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *flags: str) -> list[list[str]]:
    """Runs a campaign, and returns the cells of its last table."""
    ran = subprocess.run(
        [sys.executable, str(ROOT / "reliability" / script), *flags],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    table = ran.stdout[ran.stdout.rindex("|---") :].splitlines()[1:]
    return [line.split("|")[1:] for line in table if line.startswith("|")]


@pytest.mark.slow
def test_every_reader_accepts_or_refuses_with_a_sentence():
    rows = run("fuzz.py", "--inputs", "30")
    assert len(rows) == 6
    for target, inputs, accepted, refused, *_ in rows:
        assert int(inputs) >= 30 and int(accepted) + int(refused) == int(inputs), target
