import os
import subprocess
import sys
from pathlib import Path

import pytest

from fetal_flax._util.compilation_cache import keep_compilations

DIRECTORY = "JAX_COMPILATION_CACHE_DIR"
COMPILE = """
from fetal_flax._util.compilation_cache import keep_compilations
keep_compilations({!r})
import jax
from jax import monitoring
hits = []
monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
jax.jit(lambda x: jax.numpy.linalg.svd(x @ x.T)[1].sum())(jax.numpy.eye(64))
print(sum(hits))
"""


@pytest.fixture
def environment(monkeypatch) -> None:
    """As it was before the tests chose a folder; put back afterwards."""
    for name in (DIRECTORY, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_a_second_process_finds_what_the_first_compiled(environment, tmp_path, monkeypatch):
    # On a quiet machine a small function is compiled sooner than it is worth keeping.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    command = [sys.executable, "-c", COMPILE.format(str(tmp_path))]
    hits = [
        int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(2)
    ]
    assert hits[0] == 0 and hits[1] > 0
    (machine,) = (tmp_path / "compiled").iterdir()
    assert len(machine.name) == 16 and any(machine.iterdir())


def test_the_environment_goes_first(environment, tmp_path, monkeypatch):
    monkeypatch.setenv(DIRECTORY, "elsewhere")
    keep_compilations(str(tmp_path))
    assert os.environ[DIRECTORY] == "elsewhere" and not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_nothing_is_kept(environment, tmp_path):
    (tmp_path / "file").touch()
    keep_compilations(str(tmp_path / "file"))
    assert DIRECTORY not in os.environ


def test_each_kind_of_processor_has_its_folder(environment, tmp_path, monkeypatch):
    keep_compilations(str(tmp_path))
    ours = Path(os.environ.pop(DIRECTORY))
    monkeypatch.setattr("platform.machine", lambda: "another")
    keep_compilations(str(tmp_path))
    assert Path(os.environ.pop(DIRECTORY)) != ours
