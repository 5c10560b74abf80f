import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fetal_flax._util.locks import locked
from fetal_flax.errors import InputError

_HOLD = """
import sys, time
from pathlib import Path
from fetal_flax._util.locks import locked
with locked(Path(sys.argv[1]), wait=False):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(path: Path, seconds: float) -> subprocess.Popen:
    """Starts a process that holds the lock."""
    command = [sys.executable, "-c", _HOLD, str(path), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_holder_is_named_and_a_killed_one_lets_go(tmp_path):
    path = tmp_path / "new" / ".lock"
    with hold(path, 60) as holder:
        for _ in range(2):  # Asking doesn't wipe the name away.
            with (
                pytest.raises(InputError, match=rf"new is in use by process {holder.pid} on \S"),
                locked(path, wait=False),
            ):
                pass
        holder.send_signal(signal.SIGKILL)
    with locked(path, wait=False):
        assert path.read_text().split()[:2] == ["process", str(os.getpid())]


def test_a_holder_that_ends_is_waited_for(tmp_path):
    path = tmp_path / ".lock"
    with hold(path, 0.3) as holder, locked(path, wait=True):
        assert holder.wait(10) == 0


def test_a_lock_let_go_is_free(tmp_path):
    path = tmp_path / ".lock"
    for _ in range(2):
        with locked(path, wait=False), pytest.raises(InputError), locked(path, wait=False):
            pass


def test_a_lock_that_cannot_be_made_is_an_oserror(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), locked(tmp_path / "file" / ".lock", wait=False):
        pass
