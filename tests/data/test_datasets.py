import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fetal_flax.config import DataConfig
from fetal_flax.data import datasets as builders
from fetal_flax.data import hc18
from fetal_flax.data.phantoms import builder, make_phantom
from fetal_flax.errors import InputError


def _tiny(folder: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(data_dir=str(folder), cache_dir=str(tmp_path / "cache"))


def _phantoms(tmp_path: Path) -> DataConfig:
    return DataConfig(
        dataset="fetal_phantom",
        phantom_count=3,
        phantom_size=(64, 96),
        cache_dir=str(tmp_path / "cache"),
    )


def _files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_hc18_comes_back_as_it_was(tiny_hc18: Path, tmp_path: Path):
    dataset = builders.open_dataset(_tiny(tiny_hc18, tmp_path), seed=0)
    records = hc18.find_records(tiny_hc18)
    assert len(dataset) == 6
    assert dataset.names == tuple(r.name for r in records)
    assert dataset.names == tuple(sorted(dataset.names))
    assert dataset.examinations == tuple(r.examination for r in records)
    for index, expected in enumerate(records):
        record = dataset.record(index)
        image, mask = hc18.load(expected)
        np.testing.assert_array_equal(record.image, image)
        np.testing.assert_array_equal(record.mask, mask)
        assert (record.name, record.examination) == (expected.name, expected.examination)
        assert record.pixel_size_mm == expected.pixel_size_mm  # All 64 bits.
        assert record.head_circumference_mm == expected.head_circumference_mm


def test_phantoms_come_back_as_they_were(tmp_path: Path):
    dataset = builders.open_dataset(_phantoms(tmp_path), seed=5)
    assert len(set(dataset.examinations)) == len(dataset) == 3
    for index in range(3):
        record, phantom = dataset.record(index), make_phantom(5, index, height=64, width=96)
        np.testing.assert_array_equal(record.image, phantom.image)
        np.testing.assert_array_equal(record.mask, phantom.mask)
        assert record.pixel_size_mm == phantom.pixel_size_mm
        assert record.head_circumference_mm == phantom.head_circumference_mm


def test_process_pool_makes_the_same_phantoms(tmp_path: Path, monkeypatch):
    alone = builders.open_dataset(_phantoms(tmp_path / "a"), seed=0)
    monkeypatch.setattr(builder, "_PHANTOMS_PER_WORKER", 1)
    monkeypatch.setattr(builder, "available_cpus", lambda: 2)
    pooled = builders.open_dataset(_phantoms(tmp_path / "b"), seed=0)
    assert not multiprocessing.active_children()
    for index in range(3):
        np.testing.assert_array_equal(alone.record(index).image, pooled.record(index).image)


def test_prepares_once(tiny_hc18: Path, tmp_path: Path):
    config = _tiny(tiny_hc18, tmp_path)
    builders.open_dataset(config, seed=0)
    prepared = _files(tmp_path / "cache")
    builders.open_dataset(config, seed=1)  # HC18 doesn't depend on the seed.
    builders.open_dataset(_tiny(tiny_hc18 / hc18.IMAGES, tmp_path), seed=0)
    again = _files(tmp_path / "cache")
    assert {p: t for p, t in again.items() if p.name != "lock"} == {
        p: t for p, t in prepared.items() if p.name != "lock"
    }


def test_a_changed_folder_is_another_dataset(tiny_hc18: Path, tmp_path: Path):
    config = _tiny(tiny_hc18, tmp_path)
    before = builders.open_dataset(config, seed=0)
    (tiny_hc18 / hc18.IMAGES / "000_HC.png").unlink()
    after = builders.open_dataset(config, seed=0)
    assert after.names == before.names[1:]
    assert len(before) == 6
    assert before.record(0).name == "000_HC"


def test_each_phantom_setting_is_another_dataset(tmp_path: Path):
    first = builders.open_dataset(_phantoms(tmp_path), seed=0)
    other_seed = builders.open_dataset(_phantoms(tmp_path), seed=1)
    assert np.any(first.record(0).image != other_seed.record(0).image)
    assert len(list((tmp_path / "cache" / "datasets").iterdir())) == 2


def test_can_be_pickled(tiny_hc18: Path, tmp_path: Path):
    dataset = builders.open_dataset(_tiny(tiny_hc18, tmp_path), seed=0)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.names == dataset.names
    np.testing.assert_array_equal(copy.record(4).mask, dataset.record(4).mask)


def test_problems_leave_nothing_prepared(tiny_hc18: Path, tmp_path: Path):
    (tiny_hc18 / hc18.IMAGES / "003_HC.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"003_HC\.png is not an image"):
        builders.open_dataset(_tiny(tiny_hc18, tmp_path), seed=0)
    assert not list((tmp_path / "cache").rglob("*.json"))
    assert not list((tmp_path / "cache").rglob("*incomplete*"))


def test_cache_that_cannot_be_written(tiny_hc18: Path, tmp_path: Path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(InputError, match=r"can't write the prepared dataset to .*cache"):
        builders.open_dataset(_tiny(tiny_hc18, tmp_path), seed=0)


def _script(body: str, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-c", body, *arguments]


def test_needs_neither_tensorflow_nor_jax(tiny_hc18: Path, tmp_path: Path):
    body = (
        "import sys; from fetal_flax.data.datasets import *\n"
        "config = DataConfig(data_dir=sys.argv[1], cache_dir=sys.argv[2])\n"
        "open_dataset(config, 0).record(0)\n"
        "import json; print(json.dumps([m for m in ('tensorflow', 'jax', 'torch')"
        " if m in sys.modules]))"
    )
    command = _script(body, str(tiny_hc18), str(tmp_path / "cache"))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []  # And nothing else is said on stdout.


_SLOW = """
import os, sys, time
from fetal_flax.config import DataConfig
from fetal_flax.data import datasets as builders
from fetal_flax.data.phantoms import builder
make = builder._example
def slow(seed, size, index):
    if index == 1:
        os.write(1, b"half way\\n")  # TFDS's stdout is redirected.
        time.sleep(60)
    return make(seed, size, index)
builder._example = slow
builders.open_dataset(DataConfig(dataset="fetal_phantom", phantom_count=3, phantom_size=(64, 96),
                                 cache_dir=sys.argv[1]), 0)
"""


def test_survives_being_killed_half_way(tmp_path: Path):
    command = _script(_SLOW, str(tmp_path / "cache"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half way\n"
        process.send_signal(signal.SIGKILL)
    assert list((tmp_path / "cache").rglob("*incomplete*"))
    assert len(builders.open_dataset(_phantoms(tmp_path), seed=0)) == 3
    assert not list((tmp_path / "cache").rglob("*incomplete*"))


_ORPHANS = """
import concurrent.futures, multiprocessing, os, time
from fetal_flax._util.machine import start_worker
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, start_worker) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(60)
"""


def test_workers_end_with_a_killed_parent(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(_ORPHANS)
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        os.kill(worker, 0)
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


_UNGUARDED = """
import sys
from fetal_flax.config import DataConfig
from fetal_flax.data import datasets as builders
from fetal_flax.data.phantoms import builder
builder._PHANTOMS_PER_WORKER = 1
builder.available_cpus = lambda: 2
config = DataConfig(dataset="fetal_phantom", phantom_count=2, cache_dir=sys.argv[1])
print(len(builders.open_dataset(config, 0)))
"""


def test_a_script_without_main_guard_is_told_so(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(_UNGUARDED)
    command = [sys.executable, str(script), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "InputError: the workers that make the phantoms ended early" in done.stderr
    assert "__main__" in done.stderr


def test_a_script_from_stdin_makes_phantoms_without_workers(tmp_path: Path):
    command = [sys.executable, "-", str(tmp_path / "cache")]
    done = subprocess.run(
        command, input=_UNGUARDED, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "2\n"
