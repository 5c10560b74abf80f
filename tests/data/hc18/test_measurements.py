import os
from pathlib import Path

import pytest

from fetal_flax.data import hc18
from fetal_flax.errors import InputError


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("a\x1b\nb,0.2\na\x1b\nb,0.2\n", r"'a\\x1b' has None as its pixel size"),
        ('"a\nb",0.2\n"a\nb",0.2\n', r"'a\\nb' has two rows"),
        ("a," + "9" * 5000 + "x\n", "a has '9{99}… as its"),
        ("a,1000\n", "a has '1000' as its pixel size.* not a positive number below 1000"),
        ("a,1e308\n", "a has '1e308' as its"),
        ("\n,\n", " has '' as its pixel size"),
    ],
)
def test_what_a_csv_holds_is_made_safe_to_print(content, named, tmp_path: Path):
    path = tmp_path / "sizes.csv"
    path.write_text("filename,pixel size(mm)\n" + content)
    with pytest.raises(InputError, match=named) as error:
        hc18.read_pixel_sizes(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_a_row_too_short_for_its_name_is_refused(tmp_path: Path):
    path = tmp_path / "sizes.csv"
    path.write_text("pixel size(mm),filename\n0.2\n0.3,a\n0.3\n")
    with pytest.raises(InputError, match="has two rows"):
        hc18.read_pixel_sizes(path)


def test_a_pipe_in_place_of_the_csv_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "sizes.csv")
    with pytest.raises(InputError, match="give a regular file"):
        hc18.read_pixel_sizes(tmp_path / "sizes.csv")
