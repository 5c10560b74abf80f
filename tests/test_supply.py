"""What the package may not do behind the user's back: unpickle, or talk to the network."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("*.py", "benchmarks/*.py", "configs/*.py", "fetal_flax/**/*.py", "reliability/*.py")
OURS = sorted(path for pattern in FOLDERS for path in ROOT.glob(pattern))
# The second to find a port for two processes on this machine.
OPENS_CONNECTIONS = {"fetal_flax/_util/download.py", "reliability/faults.py"}
UNPICKLERS = {"cloudpickle", "dill", "joblib", "marshal", "shelve", "_pickle"}
NETWORK = {"ftplib", "http", "requests", "socket", "ssl", "urllib", "urllib3", "httpx", "aiohttp"}


def imported(tree: ast.AST) -> set[str]:
    """Modules that are imported, by the first part of their names."""
    names = [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def unpickling(tree: ast.AST) -> list[str]:
    """Expressions that unpickle or may; of `pickle`, its codes and its error are allowed."""
    found = [f"import of {name}" for name in imported(tree) & UNPICKLERS]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "pickle":
            found.append("import from pickle")
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            allowed = node.attr.isupper() or node.attr == "UnpicklingError"
            found += [] if allowed else [f"pickle.{node.attr}"]
        if isinstance(node, ast.Call):
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if keywords.get("allow_pickle", "False") != "False":
                found.append(ast.unparse(node))
            if ast.unparse(node.func) == "torch.load" and keywords.get("weights_only") != "True":
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle; pickle.loads(b'')",
        "import pickle; pickle.Unpickler(f)",
        "from pickle import loads",
        "import dill",
        "np.load(p, allow_pickle=True)",
        "torch.load(p)",
    ],
)
def test_unpickling_is_seen(code):
    assert unpickling(ast.parse(code))


def test_no_module_unpickles():
    assert len(OURS) > 60
    found = {str(path): unpickling(ast.parse(path.read_text())) for path in OURS}
    assert {path: what for path, what in found.items() if what} == {}


def test_one_module_opens_connections():
    users = {
        path.relative_to(ROOT).as_posix()
        for path in OURS
        if imported(ast.parse(path.read_text())) & NETWORK
    }
    assert users == OPENS_CONNECTIONS


# An audit hook sees every connection and look-up of Python code, in libraries too. It ends the
# process, since a library could swallow an exception. docs/supply.md has what C++ code does.
WATCHED = """
import os, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        found = isinstance(arguments[-1], tuple)  # Host and port; a Unix socket has a path.
    else:
        found = event == "socket.getaddrinfo"
    if found:
        print("network:", event, arguments[1:], file=sys.stderr, flush=True)
        os._exit(99)

sys.addaudithook(refuse)
from fetal_flax.commands.main import main
sys.exit(main(sys.argv[1:]))
"""


def watched(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments],
        cwd=folder,
        env={**os.environ, "XLA_FLAGS": ""},  # One device: six images make no batch for eight.
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_connections_are_seen(tmp_path):
    """Of the download, which is one of the two that there are."""
    ran = watched("train", "--data.dataset", "hc18", "--data.cache-dir", "cache", folder=tmp_path)
    assert ran.returncode == 99
    assert "network: socket." in ran.stderr


@pytest.mark.slow
def test_training_evaluation_and_prediction_make_no_connection(tiny_hc18, tmp_path):
    config = ["--model.name", "unet", "--model.base-width", "2", "--encoder.weights", "none"]
    config += ["--data.dataset", "hc18", "--data.data-dir", str(tiny_hc18), "--data.workers", "0"]
    config += ["--data.image-size", "32", "32", "--data.cache-dir", "cache"]
    config += ["--schedule.epochs", "1", "--schedule.batch-size", "2"]
    run, images = "run", str(tiny_hc18 / "training_set")
    for command in (
        ["train", *config, "--workdir", run],
        ["evaluate", "--checkpoint", run, "--output", "evaluation"],
        ["predict", "--checkpoint", run, "--input", images, "--output", "predicted"],
        ["convert", "--to-torch", "--source", run, "--output", "network.pth"],
        ["convert", "--source", "network.pth", "--output", "converted"],
    ):
        ran = watched(*command, folder=tmp_path)
        assert ran.returncode == 0, (command, ran.stderr)
