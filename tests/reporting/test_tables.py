import csv
import json
import os
import stat

import cv2
import numpy as np
import pytest

from fetal_flax.errors import InputError
from fetal_flax.reporting.tables import Row, write_atomically, write_mask, write_metrics

METRICS = [
    {"dice": 0.9, "iou": 0.8, "pixel_accuracy": 0.95},
    {"dice": 1 / 3, "iou": 0.2, "pixel_accuracy": 0.5},
]


def rows(*names: str, **columns: list) -> list[Row]:
    return [
        Row(name, metrics, {column: values[index] for column, values in columns.items()})
        for index, (name, metrics) in enumerate(zip(names, METRICS, strict=False))
    ]


def test_metrics_json_holds_the_aggregate_and_the_run(tmp_path):
    run = {"checkpoint": "runs/hc18", "config": {"seed": 0}}
    returned = write_metrics(tmp_path / "new" / "out", rows("a", "b"), run=run)
    written = json.loads((tmp_path / "new" / "out" / "metrics.json").read_text())
    assert written == returned
    assert written["n"] == 2
    assert written["dice"]["mean"] == pytest.approx((0.9 + 1 / 3) / 2)
    assert set(written["dice"]) == {"mean", "std", "median", "ci95"} == set(written["iou"])
    assert written["run"] == run and written["by"] == {}


def test_groups_have_an_aggregate_each(tmp_path):
    written = write_metrics(
        tmp_path, rows("a", "b", trimester=["third", "first"], fold=[0, 0]), run={}
    )
    by = written["by"]
    assert list(by) == ["trimester", "fold"] and list(by["trimester"]) == ["first", "third"]
    assert by["trimester"]["third"]["n"] == 1
    assert by["trimester"]["third"]["dice"]["mean"] == 0.9
    assert by["fold"]["0"]["iou"] == written["iou"]


def test_per_image_csv_reads_back_exactly(tmp_path):
    write_metrics(tmp_path, rows("a", "b, c", height=[540, 270]), run={})
    with open(tmp_path / "per_image.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == ["name", "dice", "iou", "pixel_accuracy", "height"]
    assert [row["name"] for row in read] == ["a", "b, c"]
    assert [float(row["dice"]) for row in read] == [0.9, 1 / 3]
    assert [row["height"] for row in read] == ["540", "270"]


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([], InputError, "no images"),
        (rows("a", "b", dice=[1, 1]), ValueError, "twice"),
        ([rows("a")[0], Row("b", {"dice": 1.0}, {})], ValueError, "same metrics"),
        ([rows("a")[0], Row("b", METRICS[0], {"height": 540})], ValueError, "same columns"),
    ],
)
def test_nothing_is_written_for_tables_that_do_not_fit(tmp_path, bad, error, message):
    with pytest.raises(error, match=message):
        write_metrics(tmp_path / "out", bad, run={})
    assert not (tmp_path / "out").exists()


def test_numbers_that_json_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_metrics(tmp_path, [Row("a", {"dice": float("nan")}, {})], run={})
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("shapes_unchecked")
def test_mask_is_written_at_its_own_size_as_0_and_255(tmp_path):
    mask = np.random.default_rng(0).random((13, 21)) < 0.5
    path = tmp_path / "masks" / "000_HC.png"
    write_mask(path, mask)
    read = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert read is not None and read.dtype == np.uint8
    np.testing.assert_array_equal(read, np.where(mask, 255, 0))
    with pytest.raises(ValueError, match="uint8"):
        write_mask(path, mask.astype(np.uint8))


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match=r"metrics\.json \(No space left on device\)"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="out"):
        write_atomically(tmp_path / "out" / "metrics.json", b"")


def test_files_get_the_permissions_of_ordinary_ones(tmp_path):
    (tmp_path / "ordinary").write_bytes(b"")
    write_atomically(tmp_path / "written", b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "written")]
    assert modes[0] == modes[1]
