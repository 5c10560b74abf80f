"""Benchmarks run to their end and print their tables; so small, the figures say nothing."""

import re
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

import fetal_flax as ff

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--model.name", "unet", "--model.base-width", "4", "--encoder.weights", "none")
PHANTOMS = ("--data.image-size", "32", "32", "--data.phantom-count", "60", "--data.workers", "0")


def run(script: str, *flags: str) -> str:
    """Runs a benchmark, and returns what it prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *flags]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_runtimes_are_timed_in_turn():
    last_row = run("runtimes.py", "--quick").strip().splitlines()[-1]
    assert re.match(r"\| onnxruntime, int8 \| [\d.]+ \(", last_row)


def test_a_start_is_timed(tmp_path):
    small = (*SMALL, *PHANTOMS, "--workdir", str(tmp_path / "run"))
    printed = run("startup.py", "--repeats", "1", "--", *small)
    assert re.match(r"\| the next 1, median \| [\d.]+ \| [\d.]+ \|", printed.splitlines()[-1])


def test_a_folder_is_timed_beside_the_network(tmp_path):
    for index in range(3):
        image = ff.make_phantom(0, index).image
        assert cv2.imwrite(str(tmp_path / f"{index}.png"), image)
    few = ("--images", "4", "--repeats", "1", "--network", "hc18-compact")
    wall, processor = run("folder.py", "--folder", str(tmp_path), *few).splitlines()
    for line, kind in ((wall, "wall"), (processor, "processor")):
        assert re.match(rf"{kind}: network alone [\d.]+ ms an image, folder [\d.]+, median", line)
