"""Commands as containers and schedulers run them: without a home, a terminal, a disk of their own.

Each row of the matrix is a real process. Other users and mounts need root and Linux.
"""

import csv
import dataclasses
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOBODY = ("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups")
IN_OWN_MOUNTS = ("unshare", "-m", "sh", "-c")
# The output alone can be written: a container's volume.
READ_ONLY_ROOT = (
    "mount --rbind / /mnt && mount -o remount,ro,bind /mnt &&"
    ' mount --bind "$FOLDER" "/mnt$FOLDER" && exec chroot /mnt "$0" "$@"'
)
SMALL_SHARED_MEMORY = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$0" "$@"'
TINY_TRAINING = (
    *("--model.name", "unet", "--model.base-width", "4", "--encoder.weights", "none"),
    *("--data.phantom-count", "40", "--data.phantom-size", "64", "96", "--data.workers", "2"),
    *("--data.image-size", "128", "128", "--schedule.epochs", "1", "--schedule.batch-size", "8"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """How a process is run."""

    before: tuple[str, ...] = ()
    """The command that runs the command."""
    settings: dict[str, str | None] = dataclasses.field(default_factory=dict)
    """Of the environment; None takes one away."""
    after: str = ""
    """What a shell is told behind the command."""


MATRIX = {
    "no home": Row(settings={"HOME": None}),
    "neither home nor an entry in passwd": Row(NOBODY, {"HOME": None, "USER": None}),
    "a home that is not there": Row(NOBODY, {"HOME": "/nonexistent"}),
    "a home that may not be written": Row(NOBODY, {"HOME": "/"}),
    "a read-only root": Row((*IN_OWN_MOUNTS, READ_ONLY_ROOT), {"HOME": "/root"}),
    "a read-only root without a home": Row(
        (*IN_OWN_MOUNTS, READ_ONLY_ROOT, *NOBODY), {"HOME": None, "USER": None}
    ),
    "small shared memory": Row((*IN_OWN_MOUNTS, SMALL_SHARED_MEMORY)),
    "no terminal, no streams": Row(after="<&- >&- 2>&-"),
    "the C locale": Row(settings={"LC_ALL": "C", "LANG": "C"}),
    "streams in ASCII": Row(settings={"PYTHONIOENCODING": "ascii:strict"}),
    "a pipe that nobody reads": Row(after="| true"),
    "a pipe that is read a little": Row(after="2>&1 | head -c 20"),
}
FAST = ("a read-only root",)
"""Rows whose predictions are no slow tests; the other rows' are."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users can enter, which pytest's are not."""
    path = Path(tempfile.mkdtemp(prefix="container-"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


@functools.cache
def others_can_read_this() -> bool:
    """Whether another user reaches Python and the checkout."""
    command = [*NOBODY, sys.executable, "-c", "import fetal_flax, jax"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


def run(row: Row, folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    if row.before and os.geteuid() != 0:
        pytest.skip("other users and mounts need root")
    if row.before and shutil.which(row.before[0]) is None:
        pytest.skip(f"needs {row.before[0]}")
    if "setpriv" in row.before and not others_can_read_this():
        pytest.skip("Python or the checkout is in a folder that is closed to other users")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "FOLDER": str(folder)}
    del environment["JAX_COMPILATION_CACHE_DIR"]  # Commands look for a place of their own.
    for name, value in row.settings.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    command = [*row.before, sys.executable, "-m", "fetal_flax", *arguments]
    # pipefail: the command's own exit code, not that of whoever reads it.
    shell = ["bash", "-c", f'set -o pipefail; "$@" {row.after}', "bash", *command]
    return subprocess.run(shell, cwd=folder, env=environment, capture_output=True, timeout=600)


def with_tmpdir(name: str, tmpdir: str | None) -> Row:
    """Returns a row of the matrix with a place for temporary files, or without."""
    row = MATRIX[name]
    return dataclasses.replace(row, settings={**row.settings, "TMPDIR": tmpdir})


def train(row: Row, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """Trains a tiny network in `folder`."""
    flags = (*TINY_TRAINING, "--data.workers", "0", "--workdir", str(folder / "run"))
    ran = run(row, folder, "train", *flags)
    assert ran.returncode == 0, ran.stderr.decode()
    return ran


@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MATRIX],
)
def test_predict_measures_as_ever(name, threshold_network, save_network, folder):
    source, output = folder / "in", folder / "out"
    source.mkdir()
    output.mkdir()
    output.chmod(0o777)
    for stem in ("scan é 头", "b"):
        image = np.zeros((120, 160), np.uint8)
        cv2.ellipse(image, (80, 60), (50, 38), 20, 0, 360, (200,), 4)
        (source / f"{stem}.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
    (source / "broken é.png").write_bytes(b"no image")
    save_network(folder / "network", threshold_network)
    flags = ("--input", str(source), "--output", str(output), "--pixel-size", "0.5")
    ran = run(MATRIX[name], folder, "predict", "--checkpoint", str(folder / "network"), *flags)
    assert ran.returncode == 2, ran.stderr.decode()
    assert b"Traceback" not in ran.stderr + ran.stdout
    with (output / "measurements.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["b", "scan é 头"]
    assert rows["b"]["hc_mm"] == rows["scan é 头"]["hc_mm"] != ""
    assert (output / "masks" / "scan é 头.png").is_file()
    if not MATRIX[name].after:
        said = [line for line in ran.stderr.splitlines() if line.startswith(b"fetal-flax")]
        assert len(said) == 1 and b"broken" in said[0]


@pytest.mark.parametrize("name", MATRIX)
@pytest.mark.parametrize("command", ["--version", pytest.param("--help", marks=pytest.mark.slow)])
def test_what_needs_nothing_needs_no_home_either(name, command, folder):
    ran = run(MATRIX[name], folder, command)
    assert ran.returncode == 0, ran.stderr.decode()
    assert not ran.stderr
    if not MATRIX[name].after:
        assert b"fetal-flax" in ran.stdout


@pytest.mark.slow
def test_a_training_without_a_home_keeps_its_data_among_the_temporary_files(folder):
    train(with_tmpdir("neither home nor an entry in passwd", str(folder)), folder)
    assert (folder / "fetal_flax-54321" / "datasets").is_dir()
    assert (folder / "run" / "checkpoints").is_dir()


@pytest.mark.slow
def test_a_read_only_root_without_a_home_has_nothing_to_say(folder):
    row = with_tmpdir("a read-only root without a home", str(folder))
    ran = train(row, folder)
    assert all(line.startswith(b"Preparing ") for line in ran.stderr.splitlines())
    assert (folder / "run" / "curves.png").is_file()
    flags = ("--checkpoint", str(folder / "run"), "--output", str(folder / "evaluation"))
    ran = run(row, folder, "evaluate", *flags)
    assert ran.returncode == 0, ran.stderr.decode()
    assert all(line.startswith(b"Evaluating ") for line in ran.stderr.splitlines())
    assert (folder / "evaluation" / "report.html").is_file()


@pytest.mark.parametrize(
    ("command", "way_out"),
    [
        pytest.param(
            ("train", *TINY_TRAINING, "--workdir", "run"),
            "choose another --workdir",
            marks=pytest.mark.slow,
        ),
        (
            ("evaluate", "--checkpoint", "hc18-compact", "--data-dir", "hc18", "--output", "out"),
            "no folder for temporary files can be written: give one as TMPDIR",
        ),
    ],
)
def test_where_nothing_at_all_can_be_written_it_is_said(command, way_out, folder):
    row = with_tmpdir("a read-only root without a home", None)
    cache = ("--data.cache-dir", str(folder)) if command[0] == "train" else ()
    ran = run(row, folder, *command, *cache)
    assert ran.returncode == 2, ran.stderr.decode()
    (said,) = ran.stderr.splitlines()
    assert said.decode().endswith(f": {way_out}")


@pytest.mark.slow
def test_small_shared_memory_is_named(folder):
    flags = (*TINY_TRAINING, "--data.cache-dir", str(folder), "--workdir", str(folder / "run"))
    ran = run(MATRIX["small shared memory"], folder, "train", *flags)
    assert ran.returncode == 1, ran.stderr.decode()
    said = [line for line in ran.stderr.splitlines() if line.startswith(b"fetal-flax")]
    assert len(said) == 1 and b"/dev/shm" in said[0] and b"--data.workers 0" in said[0]
    assert b"make room" not in said[0]
