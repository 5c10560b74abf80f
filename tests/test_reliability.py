"""The campaigns of reliability/, in short, so that they can be run when they are needed."""

import os
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
    assert len(rows) == 9
    for target, inputs, accepted, refused, *_ in rows:
        assert int(inputs) >= 30 and int(accepted) + int(refused) == int(inputs), target


@pytest.mark.slow
def test_faults_cost_a_run_nothing():
    # Full and read-only disks are small ones that only root can mount.
    disks = 2 if os.geteuid() == 0 else 0
    few = {"kills": 2, "damages": 2, "full-disks": disks, "workers": 1, "epochs": 5}
    none = ("terms", "processes", "described-kills", "memory-epochs")
    counts = few | dict.fromkeys(none, 0)
    rows = run("faults.py", *(f"--{name}={count}" for name, count in counts.items()))
    _, faults, _, lost, changed, *_ = rows[-1]
    assert int(faults) == 5 + 2 * disks
    assert (lost, changed) == (" **0** ", " **0** ")
    assert not [row for row in rows if "no mere sentence" in row[-2] or "traceback" in row[-2]]


@pytest.mark.slow
def test_a_long_folder_takes_no_more_memory_than_a_short_one():
    rows = run("folder.py", "--images", "200", "--workers", "3")
    assert len(rows) == 10 and rows[-1][0].strip() == "200"
