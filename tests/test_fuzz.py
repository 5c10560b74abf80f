"""The campaign of reliability/fuzz.py, in short."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_every_target_accepts_or_refuses_with_a_sentence():
    ran = subprocess.run(
        [sys.executable, str(ROOT / "reliability" / "fuzz.py"), "--inputs", "200"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0, ran.stderr
    rows = [line.split("|")[1:] for line in ran.stdout.splitlines()[2:]]
    assert len(rows) == 6
    for target, inputs, accepted, refused, *_ in rows:
        assert int(inputs) >= 200 and int(accepted) and int(refused), target
