import os
from pathlib import Path

import pytest

from fetal_flax._util.cache_folder import cache_folder


def test_a_home_has_it(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("~/.cache/x") == tmp_path / ".cache" / "x"
    assert cache_folder("/somewhere/else") == Path("/somewhere/else")


@pytest.mark.parametrize("home", ["/proc/none", "/dev/null"])
def test_without_one_it_is_this_users_alone(tmp_path: Path, monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = cache_folder("~/.cache/x")
    assert folder == tmp_path / f"fetal_flax-{os.getuid()}" == cache_folder("~/.cache/x")
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("how", ["open to others", "a link"])
def test_what_somebody_else_may_have_put_there_is_not_trusted(tmp_path: Path, monkeypatch, how):
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    planted = tmp_path / f"fetal_flax-{os.getuid()}"
    if how == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        planted.symlink_to("elsewhere")
    else:
        planted.mkdir()
        planted.chmod(0o777)
    folder = cache_folder("~/.cache/x")
    assert folder.parent == tmp_path and folder not in (planted, tmp_path / "elsewhere")
    assert folder.stat().st_mode & 0o777 == 0o700
