"""The package as people install it: a wheel, in an environment of its own, outside any checkout."""

import dataclasses
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import cv2
import pytest

import fetal_flax as ff
from fetal_flax import presets
from fetal_flax.checkpoints import shipped
from fetal_flax.data.phantoms import make_phantom

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class Environment:
    """A virtual environment that has the wheel."""

    wheel: Path
    bin: Path

    def run(self, program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Runs a program of the environment."""
        # One device: small data makes no batch for eight.
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
        command = [self.bin / program, *arguments]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Environment:
    """Builds the wheel and installs it; what it depends on is borrowed from this environment.

    `.ci/run` shows that the dependencies that are declared are enough.
    """
    project, built, folder = (tmp_path_factory.mktemp(n) for n in ("project", "built", "venv"))
    ignored = shutil.ignore_patterns(".*", "runs", "__pycache__")
    shutil.copytree(ROOT, project, ignore=ignored, dirs_exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(built), str(project)], check=True)
    shutil.rmtree(project)
    (wheel,) = built.glob("*.whl")

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    python = folder / "bin" / "python"
    install = [*pip, "--python", str(python), "install", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    # A path of a .pth file comes last, and .pth files in it, such as an editable install's, don't
    # count.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Environment(wheel, folder / "bin")


def test_the_wheel_says_what_it_is_and_carries_presets_and_networks(installed):
    with zipfile.ZipFile(installed.wheel) as wheel:
        for path in presets.FOLDER.glob("*.py"):
            assert wheel.read(f"fetal_flax/_presets/{path.name}") == path.read_bytes()
        for path in shipped.FOLDER.rglob("*"):
            if path.is_file():
                name = path.relative_to(shipped.FOLDER.parent).as_posix()
                assert wheel.read(f"fetal_flax/{name}") == path.read_bytes()
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = wheel.read(name).decode().splitlines()
        assert "fetal_flax/py.typed" in wheel.namelist()
    assert {
        "Name: fetal_flax",
        f"Version: {ff.__version__}",
        "License-Expression: Apache-2.0",
        "License-File: fetal_flax/networks/LICENSE.torchvision",
    } <= set(metadata)


def test_presets_train_by_name_anywhere(installed, tiny_hc18, tmp_path):
    unknown = installed.run("fetal-flax", "train", "hc19", cwd=tmp_path)
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert all(name in unknown.stderr for name in presets.names())

    flags = ["--model.name", "unet", "--model.base-width", "2", "--encoder.weights", "none"]
    flags += ["--data.image-size", "32", "32", "--data.cache-dir", "cache", "--data.workers", "0"]
    data = ["--data.data-dir", str(tiny_hc18), "--schedule.batch-size", "2"]
    ran = installed.run("fetal-flax", "train", "hc18", "--dry-run", *flags, *data, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "a run takes 100 epochs" in ran.stdout and not (tmp_path / "runs").exists()

    flags += ["--data.phantom-count", "45", "--schedule.epochs", "1"]
    ran = installed.run("fetal-flax", "train", "phantom", *flags, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "runs" / "phantom" / "metrics.csv").is_file()


_FOUR_LINES = """
import fetal_flax as ff
image, pixel_size_mm = ff.read_image("scan.png")
result = ff.load("hc18-described").measure(image, pixel_size_mm or 0.2)
print(result.hc_mm, ff.__file__, sep="\\n")
"""


def test_a_scan_is_measured_anywhere_by_command_and_in_four_lines(installed, tmp_path):
    cv2.imwrite(str(tmp_path / "scan.png"), make_phantom(0, 0, height=270, width=400).image)
    for program in (["fetal-flax"], ["python", "-m", "fetal_flax"]):
        ran = installed.run(*program, "--version", cwd=tmp_path)
        assert ran.stdout == f"fetal-flax {ff.__version__}\n", ran.stderr

    flags = ["--input", "scan.png", "--output", "out", "--pixel-size", "0.2"]
    ran = installed.run("fetal-flax", "predict", *flags, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out" / "measurements.csv").is_file()

    ran = installed.run("python", "-c", _FOUR_LINES, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    millimetres, file = ran.stdout.splitlines()
    assert float(millimetres) > 10
    assert Path(file).is_relative_to(installed.bin.parent)
