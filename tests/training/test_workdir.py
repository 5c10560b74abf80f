"""Who may use a workdir, and what is left of one that nothing was written to."""

from pathlib import Path

import pytest

from fetal_flax._util.locks import locked
from fetal_flax.errors import InputError
from fetal_flax.training.workdir import hold_workdir


@pytest.fixture
def open_files_stay(monkeypatch) -> None:
    """Makes `unlink` refuse a file that is open, as on Windows."""
    opened = []
    really_open, really_unlink = Path.open, Path.unlink

    def open_noted(path: Path, *arguments, **keywords):
        opened.append((path, really_open(path, *arguments, **keywords)))
        return opened[-1][1]

    def unlink(path: Path, *, missing_ok: bool = False) -> None:
        if any(name == path and not file.closed for name, file in opened):
            raise PermissionError(13, "The process cannot access the file")
        really_unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "open", open_noted)
    monkeypatch.setattr(Path, "unlink", unlink)


def test_an_unused_workdir_is_gone_with_the_folders_made_for_it(open_files_stay, tmp_path):
    del open_files_stay
    with hold_workdir(tmp_path / "runs" / "new"):
        assert (tmp_path / "runs" / "new" / ".lock").is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_was_there_stays_without_the_lock(open_files_stay, tmp_path):
    del open_files_stay
    with pytest.raises(RuntimeError, match="as it was"), hold_workdir(tmp_path):
        raise RuntimeError("as it was")
    assert list(tmp_path.iterdir()) == []


def test_a_used_workdir_keeps_everything(tmp_path):
    with hold_workdir(tmp_path / "run"):
        (tmp_path / "run" / "config.json").touch()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "config.json"}


def test_who_comes_second_takes_nothing_away_from_the_first(tmp_path):
    with locked(tmp_path / "run" / ".lock", wait=False):
        with (
            pytest.raises(InputError, match="is in use by process"),
            hold_workdir(tmp_path / "run"),
        ):
            pass
        assert (tmp_path / "run" / ".lock").is_file()
