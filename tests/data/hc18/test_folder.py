import csv
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from fetal_flax.data import hc18
from fetal_flax.errors import InputError, InputWarning


def _csv_rows(folder: Path) -> list[list[str]]:
    with (folder / hc18.CSV).open(newline="") as file:
        return list(csv.reader(file))


def _edit_csv(folder: Path, name: str, column: int, value: str) -> None:
    path = folder / hc18.CSV
    rows = _csv_rows(folder)
    for row in rows:
        if row[0] == name:
            row[column] = value
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_finds_records_in_order(tiny_hc18: Path):
    records = hc18.find_records(tiny_hc18)
    assert [r.examination for r in records] == ["000", "001", "001", "002", "003", "003"]
    assert [r.image_path for r in records] == sorted((tiny_hc18 / hc18.IMAGES).glob("*HC.png"))
    for record, row in zip(records, _csv_rows(tiny_hc18)[1:], strict=True):
        assert f"{record.name}.png" == row[0]
        assert record.pixel_size_mm == float(row[1])
        assert record.head_circumference_mm == float(row[2])


def test_loads_image_and_filled_mask(tiny_hc18: Path):
    for record in hc18.find_records(tiny_hc18):
        image, mask = hc18.load(record)
        np.testing.assert_array_equal(image, cv2.imread(str(record.image_path), 0))
        assert mask.shape == image.shape
        assert 0.1 < (mask == 255).mean() < 0.6


def test_csv_has_crlf_and_may_have_a_mark(tiny_hc18: Path):
    path = tiny_hc18 / hc18.CSV
    assert b"\r\n" in path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(hc18.find_records(tiny_hc18)) == 6


@pytest.mark.parametrize("where", ["root", "beside", "inside"])
def test_accepted_layouts(tiny_hc18: Path, where: str):
    images = tiny_hc18 / hc18.IMAGES
    if where == "inside":
        (tiny_hc18 / hc18.CSV).rename(images / hc18.CSV)
    assert len(hc18.find_records(tiny_hc18 if where == "root" else images)) == 6


def test_subset(tiny_hc18: Path):
    for path in (tiny_hc18 / hc18.IMAGES).glob("001_*"):
        path.unlink()
    assert [r.examination for r in hc18.find_records(tiny_hc18)] == ["000", "002", "003", "003"]


def _break(folder: Path, problem: str) -> None:
    image = folder / hc18.IMAGES / "001_HC.png"
    annotation = image.with_name("001_HC_Annotation.png")
    if problem == "broken image":
        image.write_bytes(image.read_bytes()[:100])
    elif problem == "empty annotation":
        annotation.touch()
        annotation.write_bytes(b"")
    elif problem == "no annotation":
        annotation.unlink()
    elif problem == "black annotation":
        cv2.imwrite(str(annotation), np.zeros((108, 160), np.uint8))
    elif problem == "other size":
        cv2.imwrite(str(image), np.zeros((108, 161), np.uint8))
    elif problem == "no row":
        _edit_csv(folder, "001_HC.png", 0, "901_HC.png")
    elif problem == "two rows":
        _edit_csv(folder, "000_HC.png", 0, "001_HC.png")
    elif problem == "text":
        _edit_csv(folder, "001_HC.png", 1, "wide")
    elif problem == "zero":
        _edit_csv(folder, "001_HC.png", 1, "0")
    elif problem == "nan":
        _edit_csv(folder, "001_HC.png", 2, "nan")


PROBLEMS = {
    "broken image": "is not an image",
    "empty annotation": "001_HC_Annotation.png is empty",
    "no annotation": "has no 001_HC_Annotation.png",
    "black annotation": "001_HC_Annotation.png holds no outline",
    "other size": "(108, 161)",
    "no row": "has no row",
    "two rows": "has two rows",
    "text": "'wide' as its pixel size",
    "zero": "'0' as its pixel size",
    "nan": "'nan' as its head circumference",
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_each_problem_is_named(tiny_hc18: Path, problem: str):
    _break(tiny_hc18, problem)
    with pytest.raises(InputError) as error:
        hc18.find_records(tiny_hc18)
    assert "001_HC" in str(error.value)
    assert PROBLEMS[problem] in str(error.value)


def test_all_problems_at_once_the_first_ten_by_name(tiny_hc18: Path):
    images = tiny_hc18 / hc18.IMAGES
    for number in range(100, 109):
        shutil.copy(images / "000_HC.png", images / f"{number}_HC.png")
    _break(tiny_hc18, "black annotation")
    _edit_csv(tiny_hc18, "002_HC.png", 1, "-1")
    with pytest.raises(InputError, match=r"^11 problem") as error:
        hc18.find_records(tiny_hc18)
    assert sum(f"{number}_HC.png has no" in str(error.value) for number in range(100, 109)) == 9
    assert "and 1 more" in str(error.value)


def test_wrong_folders(tiny_hc18: Path, tmp_path: Path):
    with pytest.raises(InputError, match="no such HC18 folder"):
        hc18.find_records(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is no HC18 folder"):
        hc18.find_records(tmp_path / "empty")
    shutil.copy(tiny_hc18 / hc18.CSV, tmp_path / "empty")
    with pytest.raises(InputError, match="holds no HC18 image"):
        hc18.find_records(tmp_path / "empty")
    (tmp_path / "empty" / hc18.CSV).write_text("filename,size\n")
    with pytest.raises(InputError, match=r"has no column 'pixel size\(mm\)'"):
        hc18.find_records(tmp_path / "empty")


def test_fingerprint_follows_the_files(tiny_hc18: Path):
    image = tiny_hc18 / hc18.IMAGES / "000_HC.png"
    seen = [hc18.fingerprint(tiny_hc18)]
    assert hc18.fingerprint(tiny_hc18 / hc18.IMAGES) == seen[0]
    os.utime(image, ns=(0, 12345))
    seen.append(hc18.fingerprint(tiny_hc18))
    image.rename(image.with_name("900_HC.png"))
    seen.append(hc18.fingerprint(tiny_hc18))
    _edit_csv(tiny_hc18, "000_HC.png", 1, "0.25")
    seen.append(hc18.fingerprint(tiny_hc18))
    assert len(set(seen)) == 4


def test_fingerprint_bears_links_to_nowhere_and_names_that_are_no_utf_8(tiny_hc18: Path):
    images = tiny_hc18 / hc18.IMAGES
    before = hc18.fingerprint(tiny_hc18)
    (images / "800_HC.png").symlink_to("nowhere")
    (images / "801_HC.png").symlink_to("801_HC.png")
    (images / os.fsdecode(b"\xff.png")).touch()
    assert hc18.fingerprint(tiny_hc18) != before
    with pytest.raises(InputError, match=r"2 problem\(s\).*800_HC.png has no 800_HC_Annotation"):
        hc18.find_records(tiny_hc18)


@pytest.mark.slow
def test_real_folder(shared_dir: Path):
    records = hc18.find_records(shared_dir / "hc18")
    assert len(records) == 805
    assert len({record.examination for record in records}) == 644


def _fill(path: Path, *, value: int = 255) -> None:
    outline = cv2.imread(str(path), 0)
    assert outline is not None
    cv2.imwrite(str(path), hc18.fill_outline(outline) // 255 * value)


@pytest.mark.parametrize("value", [255, 1, 100])
def test_masks_that_are_filled_already_are_masks(tiny_hc18: Path, value: int):
    records = hc18.find_records(tiny_hc18)
    masks = [hc18.load(record)[1] for record in records]
    for record in records:
        _fill(record.annotation_path, value=value)
    for record, mask in zip(hc18.find_records(tiny_hc18), masks, strict=True):
        np.testing.assert_array_equal(hc18.load(record)[1], mask)


def test_outlines_of_ones_are_outlines(tiny_hc18: Path):
    records = hc18.find_records(tiny_hc18)
    masks = [hc18.load(record)[1] for record in records]
    for record in records:
        outline = cv2.imread(str(record.annotation_path), 0)
        assert outline is not None
        cv2.imwrite(str(record.annotation_path), (outline > 127).astype(np.uint16))
    for record, mask in zip(hc18.find_records(tiny_hc18), masks, strict=True):
        np.testing.assert_array_equal(hc18.load(record)[1], mask)


def test_an_annotation_all_over_the_image_is_named(tiny_hc18: Path):
    path = tiny_hc18 / hc18.IMAGES / "001_HC_Annotation.png"
    cv2.imwrite(str(path), np.full((108, 160), 255, np.uint8))
    with pytest.raises(InputError, match=r"001_HC_Annotation.png is white all over"):
        hc18.find_records(tiny_hc18)


def _one_circumference(folder: Path) -> None:
    for name in ("000_HC", "001_HC", "003_HC"):
        _edit_csv(folder, f"{name}.png", 2, "175.5")


def _swap(folder: Path) -> None:
    images = folder / hc18.IMAGES
    a, b = (images / f"{name}_Annotation.png" for name in ("000_HC", "001_2HC"))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def _wrong_pixel_size(folder: Path) -> None:
    _edit_csv(folder, "003_HC.png", 1, "0.62")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_one_circumference, ["000_HC", "003_HC"]),
        (_swap, ["000_HC", "001_2HC"]),
        (_wrong_pixel_size, ["003_HC"]),
    ],
)
def test_a_csv_that_contradicts_the_outlines_is_named(tiny_hc18: Path, change, named):
    change(tiny_hc18)
    with pytest.warns(InputWarning, match="outline and CSV contradict each other") as warned:
        records = hc18.find_records(tiny_hc18)
    assert len(records) == 6
    said = str(warned[0].message)
    assert said.isprintable()
    for name in named:
        assert f"{name}.png has " in said
    assert "002_HC" not in said
