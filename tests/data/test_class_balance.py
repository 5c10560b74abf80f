import os
from pathlib import Path

import numpy as np
import pytest

from fetal_flax.config import DataConfig
from fetal_flax.data import class_balance as foreground
from fetal_flax.data import datasets as builders
from fetal_flax.data.class_balance import foreground_pixels
from fetal_flax.data.images import resize_mask

SIZE = (64, 96)


@pytest.fixture
def opened(tiny_hc18, tmp_path):
    config = DataConfig(data_dir=str(tiny_hc18), cache_dir=str(tmp_path / "cache"))
    return lambda: builders.open_dataset(config, seed=0)


def expected(dataset: builders.Dataset, size: tuple[int, int]) -> list[int]:
    masks = (resize_mask(dataset.record(i).mask, size) for i in range(len(dataset)))
    return [int((mask > 0).sum()) for mask in masks]


def kept(dataset: builders.Dataset) -> list[Path]:
    assert dataset.folder is not None
    return sorted(dataset.folder.glob("foreground*"))


def test_counts_once_per_size(opened, monkeypatch):
    first = foreground_pixels(opened(), SIZE)
    assert first.tolist() == expected(opened(), SIZE)
    assert 0.1 < first.mean() / (64 * 96) < 0.6
    monkeypatch.setattr(builders.Dataset, "record", None)
    np.testing.assert_array_equal(foreground_pixels(opened(), SIZE), first)
    with pytest.raises(TypeError):
        foreground_pixels(opened(), (32, 32))


def test_other_data_are_counted_anew(opened, tiny_hc18):
    before = opened()
    foreground_pixels(before, SIZE)
    image = sorted(tiny_hc18.rglob("*HC.png"))[0]
    os.utime(image, (1, 1))
    after = opened()
    assert after.folder != before.folder
    assert kept(before) and not kept(after)


@pytest.mark.parametrize("content", [b"", b'{"pixels": [1, 2', b"[]", b'{"pixels": [1, 2, 3]}'])
def test_a_damaged_file_is_replaced(opened, content):
    dataset = opened()
    counts = foreground_pixels(dataset, SIZE)
    [path] = kept(dataset)
    whole = path.read_bytes()
    path.write_bytes(content)
    np.testing.assert_array_equal(foreground_pixels(dataset, SIZE), counts)
    assert path.read_bytes() == whole
    assert kept(dataset) == [path]


def test_counting_needs_no_place_to_keep_it(opened, monkeypatch):
    def refuse(*_):
        raise foreground.InputError("read-only")

    monkeypatch.setattr(foreground, "write_atomically", refuse)
    dataset = opened()
    assert foreground_pixels(dataset, SIZE).tolist() == expected(dataset, SIZE)
    assert not kept(dataset)
    dataset.folder = None
    assert foreground_pixels(dataset, SIZE).tolist() == expected(dataset, SIZE)
