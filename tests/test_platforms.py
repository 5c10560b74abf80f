"""The package on systems that have less than Linux: Windows, and in part macOS.

None of them is at hand here. What Linux alone or POSIX alone has is taken away, and looked for in
the code; which dependencies have files for which system is for the installer to say (docs/supply.md
has the command).
"""

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fetal_flax._util import machine as processes
from fetal_flax._util.cache_folder import cache_folder
from fetal_flax.config import DataConfig
from fetal_flax.data import datasets
from fetal_flax.errors import InputError
from fetal_flax.performance import machine

PACKAGE = Path(__file__).parents[1] / "fetal_flax"
NOT_ON_WINDOWS = (
    *("_posixsubprocess", "array_record", "fcntl", "grp", "posix", "pty", "pwd", "readline"),
    *("resource", "spwd", "syslog", "termios", "tty", "uvloop"),
)
"""Modules; array-record has no wheel for it."""
OF_OS = {
    *("EX_OK", "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "WNOHANG", "chown", "confstr", "fchmod"),
    *("fchown", "fork", "forkpty", "getegid", "geteuid", "getgid", "getgroups", "getloadavg"),
    *("getpgid", "getuid", "initgroups", "killpg", "lchown", "lockf", "mkfifo", "mknod", "nice"),
    *("openpty", "pipe2", "posix_fadvise", "posix_fallocate", "posix_spawn", "pread", "pwrite"),
    *("register_at_fork", "sched_getaffinity", "sched_setaffinity", "sendfile", "setpgid"),
    *("setpriority", "setsid", "setuid", "statvfs", "sync", "sysconf", "uname", "wait"),
}
"""What `os` has on POSIX systems only; some of it on Linux only."""
OF_SIGNAL = {
    *("SIGALRM", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP"),
    *("SIGTSTP", "SIGUSR1", "SIGUSR2", "alarm", "pause", "pthread_kill", "pthread_sigmask"),
    *("setitimer", "sigtimedwait", "sigwait"),
}
GUARDED = {
    "_util/cache_folder.py: os.getuid",
    "_util/machine.py: os.sched_getaffinity",
    "performance/machine.py: import resource",
}
"""Uses that ask first; each has a test below."""


def posix_only(tree: ast.AST) -> Iterator[str]:
    """Names what the code uses that Windows lacks."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
            lacking = {"os": OF_OS, "signal": OF_SIGNAL}.get(str(node.module), set())
            yield from (f"{node.module}.{a.name}" for a in node.names if a.name in lacking)
        yield from (f"import {name}" for name in names if name.partition(".")[0] in NOT_ON_WINDOWS)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            lacking = {"os": OF_OS, "signal": OF_SIGNAL}.get(node.value.id, set())
            yield from [f"{node.value.id}.{node.attr}"] if node.attr in lacking else []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import fcntl", ["import fcntl"]),
        ("def f():\n    from pwd import getpwnam", ["import pwd"]),
        ("import os\nos.fork()", ["os.fork"]),
        ("from os import mkfifo, path", ["os.mkfifo"]),
        ("import signal\nsignal.signal(signal.SIGALRM, f)", ["signal.SIGALRM"]),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)", []),
    ],
)
def test_what_windows_lacks_is_seen(code, found):
    assert list(posix_only(ast.parse(code))) == found


def test_what_windows_lacks_is_used_where_it_is_asked_for_only():
    used = {
        f"{path.relative_to(PACKAGE).as_posix()}: {name}"
        for path in PACKAGE.rglob("*.py")
        for name in posix_only(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert used == GUARDED


# Libraries ask `sys.platform` and take what Linux has, so they are imported first, as they are.
# Then all of it is taken away.
_IMPORT_ALL = """
import importlib, os, signal, sys
{libraries}
for name in {lacking}:
    sys.modules[name] = None
for module, names in ((os, {of_os}), (signal, {of_signal})):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
for name in {modules}:
    importlib.import_module(name)
"""


def imports_of_libraries(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom) and "fetal_flax" not in ast.unparse(node):
            yield ast.unparse(node)


@pytest.mark.slow
def test_every_module_is_imported_without_what_windows_lacks():
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "__main__.py"]
    names = [path.relative_to(PACKAGE.parent).with_suffix("").parts for path in paths]
    modules = [".".join(parts).removesuffix(".__init__") for parts in names]
    libraries = sorted({line for path in paths for line in imports_of_libraries(path)})
    code = _IMPORT_ALL.format(
        libraries="\n".join(libraries),
        lacking=NOT_ON_WINDOWS,
        of_os=OF_OS,
        of_signal=OF_SIGNAL,
        modules=modules,
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("names", [OF_OS, OF_SIGNAL])
def test_what_is_taken_away_was_there(names):
    """Else a slip of the pen would go unnoticed."""
    module = os if names is OF_OS else signal
    here = {name for name in names if hasattr(module, name)}
    assert sys.platform != "linux" or here == names


def test_a_cache_among_temporary_files_needs_no_number_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "getuid", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "home").touch()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    assert cache_folder("~/.cache") == tmp_path / "fetal_flax-"


def test_processors_are_counted_where_nobody_tells_which_of_them_are_ours(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert processes.available_cpus() == os.cpu_count()


def test_the_peak_of_memory_is_left_out_where_it_is_not_told(monkeypatch):
    assert machine.peak_bytes()
    monkeypatch.setitem(sys.modules, "resource", None)
    assert machine.peak_bytes() is None


def test_a_system_without_arrayrecord_is_told_where_data_sets_can_be_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "array_record", None)
    with pytest.raises(InputError, match="there is no array-record for this system: use Linux"):
        datasets.open_dataset(DataConfig(), seed=0)
