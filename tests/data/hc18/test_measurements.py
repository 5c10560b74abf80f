import os
import unicodedata
from pathlib import Path

import pytest

from fetal_flax.data import hc18
from fetal_flax.errors import InputError


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("a\x1b\nb,0.2\na\x1b\nb,0.2\n", r"'a\\x1b' has '' as its pixel size"),
        ('"a\nb",0.2\n"a\nb",0.3\n', r"'a\\nb' has two rows"),
        ("a," + "9" * 5000 + "x\n", "a has '9{99}… as its"),
        ("a,1000\n", "a has '1000' as its pixel size.* not a positive number below 1000"),
        ("a,1e308\n", "a has '1e308' as its"),
        ("a,\n", "a has '' as its pixel size"),
        ("a,0x10\n", "a has '0x10' as its"),
        ("a,1_0\n", "a has '1_0' as its"),
        ("a,\u0661\n", "a has '\u0661' as its"),
        ("a,infinity\n", "a has 'infinity' as its"),
        ("a,0.1 cm\n", "a has '0.1 cm' as its"),
        ("a,1,5\n", "a has more cells than the header"),
    ],
)
def test_what_a_csv_holds_is_made_safe_to_print(content, named, tmp_path: Path):
    path = tmp_path / "sizes.csv"
    path.write_text("filename,pixel size(mm)\n" + content)
    with pytest.raises(InputError, match=named) as error:
        hc18.read_pixel_sizes(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_a_row_too_short_for_its_name_is_none(tmp_path: Path):
    path = tmp_path / "sizes.csv"
    path.write_text("pixel size(mm),filename\n0.2\n0.3,a\n0.3\n")
    assert hc18.read_pixel_sizes(path) == {"a": 0.3}


HEADER, TWO = "filename,pixel size(mm)\n", "a.png,0.1\nb ü.png,0.25\n"
PLAIN = HEADER + TWO
DIALECTS = {
    "as HC18 has it": PLAIN,
    "semicolons": PLAIN.replace(",", ";"),
    "semicolons and decimal commas": PLAIN.replace(",", ";").replace("0.", "0,"),
    "tabs": PLAIN.replace(",", "\t"),
    "bars": PLAIN.replace(",", "|"),
    "sep=": "sep=;\n" + PLAIN.replace(",", ";"),
    "sep= of another": "sep=!\n" + PLAIN.replace(",", "!"),
    "comments": "# made by hand\n#,;\n" + PLAIN,
    "empty rows": "\n,\n" + HEADER + "\n,,\n" + TWO + ",\n , \n\n;;\n",
    "more columns": "id,filename,pixel size(mm),,\n0,a.png,0.1,,\n1,b ü.png,0.25,x,\n",
    "spaces": " filename , pixel size(mm) \n a.png , 0.1 \nb ü.png ,\t0.25\n",
    "another header": "Filename,Pixel Size (mm)\n" + TWO,
    "a header of a program": "file_name,pixel_size_mm\n" + TWO,
    "brackets": "FILENAME,pixel size [mm]\n" + TWO,
    "units": HEADER + "a.png,0.1 mm\nb ü.png,0.25MM\n",
    "quotes": '"filename","pixel size(mm)"\n"a.png","0.1"\n"b ü.png","0,25"\n',
    "exponents": HEADER + "a.png,1E-1\nb ü.png,+2.5e-01\n",
    "row twice": PLAIN + "a.png,0.1\n",
    "bad rows of other files": PLAIN + "other.png,NA\nz.png,0.1\nz.png,0.2\nshort\n",
    "zeros at the end": PLAIN + "\0\0\0",
    "carriage returns": PLAIN.replace("\n", "\r"),
    "folders": HEADER + "test_set/a.png,0.1\nC:\\scans\\b ü.png,0.25\n",
    "capitals": HEADER + "A.PNG,0.1\nB Ü.png,0.25\n",
    "a Mac's letters": unicodedata.normalize("NFD", PLAIN),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_what_is_unambiguous_is_read(dialect, encoding, tmp_path: Path):
    path = tmp_path / "sizes.csv"
    text = DIALECTS[dialect]
    if encoding == "cp1252":
        text = unicodedata.normalize("NFC", text)
    path.write_bytes(text.encode(encoding))
    sizes = hc18.read_pixel_sizes(path, ["a.png", "b ü.png", "c.png"])
    assert sizes == {"a.png": 0.1, "b ü.png": 0.25}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name;size\na;1\n", "read with semicolons between the columns, is 'name', 'size'"),
        ("name\tpixel size (mm)\n", r"no column 'filename': .* tabs .*'pixel size \(mm\)'"),
        ("filename,pixel size (µm)\na.png,100\n", r"no column 'pixel size\(mm\)'"),
        (TWO, "its first row, read with commas between the columns, is 'a.png', '0.1'"),
        ("filename,filename,pixel size(mm)\n", "no column 'filename'"),
        ("", "is nothing"),
    ],
)
def test_columns_that_are_missing_are_named_with_those_found(text, said, tmp_path: Path):
    path = tmp_path / "sizes.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        hc18.read_pixel_sizes(path, ["a.png"])


@pytest.mark.parametrize("start", [b"PK\3\4", b"\xd0\xcf\x11\xe0\xa1\xb1"])
def test_a_workbook_is_named(tmp_path: Path, start):
    (tmp_path / "sizes.csv").write_bytes(start + b"xxxx")
    with pytest.raises(InputError, match="Excel workbook; save it as CSV"):
        hc18.read_pixel_sizes(tmp_path / "sizes.csv")


def test_rows_alike_but_for_their_case_are_not_guessed_among(tmp_path: Path):
    path = tmp_path / "sizes.csv"
    path.write_text(HEADER + "A.png,0.1\na.PNG,0.2\n")
    assert hc18.read_pixel_sizes(path, ["a.png"]) == {}
    assert hc18.read_pixel_sizes(path, ["A.png", "a.png"]) == {"A.png": 0.1}


def test_a_pipe_in_place_of_the_csv_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "sizes.csv")
    with pytest.raises(InputError, match="give a regular file"):
        hc18.read_pixel_sizes(tmp_path / "sizes.csv")


def test_a_csv_that_is_not_there_is_one_sentence(tmp_path: Path):
    with pytest.raises(InputError) as refused:
        hc18.read_pixel_sizes(tmp_path / "a.csv")
    said = f"can't read {tmp_path / 'a.csv'} (No such file or directory): give a CSV file"
    assert str(refused.value) == said
