import dataclasses
import multiprocessing
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fetal_flax.config import AugmentationConfig, DataConfig
from fetal_flax.data import datasets as builders
from fetal_flax.data import host_loader, samples
from fetal_flax.data.batch import Batch
from fetal_flax.data.host_loader import prefetch_to_device
from fetal_flax.data.images import resize_image, resize_mask
from fetal_flax.data.samples import Transform, split_into_calls
from fetal_flax.errors import InputError

SIZE = (32, 64)
MOVING = AugmentationConfig()
STILL = AugmentationConfig(enabled=False)


@pytest.fixture
def config(tiny_hc18: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(
        data_dir=str(tiny_hc18), cache_dir=str(tmp_path / "cache"), image_size=SIZE, workers=0
    )


@pytest.fixture
def dataset(config: DataConfig) -> builders.Dataset:
    return builders.open_dataset(config, seed=0)


def _train(*arguments, **changes) -> list[Batch]:
    return list(_batches(*arguments, **changes))


def _batches(
    dataset: builders.Dataset, config: DataConfig, augmentation=MOVING, **changes
) -> Generator[Batch, None, None]:
    arguments: dict[str, Any] = {
        "channels": 1,
        "seed": 0,
        "batch_size": 2,
        "total_steps": 9,
        **changes,
    }
    return host_loader.training_batches(dataset, range(5), config, augmentation, **arguments)


def _assert_equal(a: Iterable[Batch], b: Iterable[Batch]) -> None:
    for batch_a, batch_b in zip(a, b, strict=True):
        for field_a, field_b in zip(batch_a, batch_b, strict=True):
            np.testing.assert_array_equal(field_a, field_b)


def _order(batches: list[Batch]) -> list[int]:
    return np.concatenate([batch.index for batch in batches]).tolist()


def test_batches_have_the_promised_shapes(dataset, config):
    batch = _train(dataset, config, channels=3)[0]
    assert (batch.image.shape, batch.image.dtype) == ((2, *SIZE, 3), np.uint8)
    assert (batch.mask.shape, batch.mask.dtype) == ((2, *SIZE, 1), np.uint8)
    assert (batch.valid.tolist(), batch.valid.dtype) == ([True, True], np.bool_)
    assert (batch.index.shape, batch.index.dtype) == ((2,), np.int32)
    assert set(np.unique(batch.mask)) == {0, 1}
    np.testing.assert_array_equal(batch.image[..., 0], batch.image[..., 2])


def test_unaugmented_batches_hold_the_resized_records(dataset, config):
    for batch in _train(dataset, config, STILL):
        for image, mask, index in zip(batch.image, batch.mask, batch.index, strict=True):
            record = dataset.record(int(index))
            np.testing.assert_array_equal(image[..., 0], resize_image(record.image, SIZE))
            np.testing.assert_array_equal(mask[..., 0] * 255, resize_mask(record.mask, SIZE))


def test_each_epoch_takes_each_image_once_at_most(dataset, config):
    order = _order(_train(dataset, config, STILL, total_steps=200))
    epochs = [order[i : i + 4] for i in range(0, 400, 4)]  # Two steps; the fifth image sits out.
    assert all(len(set(epoch)) == 4 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 30
    counts = Counter(order)
    assert set(counts) == set(range(5))
    assert all(60 <= count <= 100 for count in counts.values())


@pytest.mark.parametrize("start", [1, 2, 5, 9])
def test_resuming_is_exact(dataset, config, start: int):
    _assert_equal(_train(dataset, config, start_step=start), _train(dataset, config)[start:])


@pytest.mark.parametrize(
    ("epoch", "start", "sizes"),
    [
        (4, 0, [4, 4, 4]),
        (4, 1, [3, 4, 4]),
        (4, 4, [4, 4]),
        (4, 7, [1, 4]),
        (4, 12, []),
        (12, 1, [3, 4, 4]),
        (6, 0, [4, 2, 4, 2]),
        (6, 1, [3, 2, 4, 2]),
        (6, 4, [2, 4, 2]),
        (6, 7, [3, 2]),
        (3, 0, [3, 3, 3, 3]),
    ],
)
def test_stacked_steps_end_at_multiples_and_with_the_epoch(dataset, config, epoch, start, sizes):
    batches = _batches(dataset, config, start_step=start, total_steps=12)
    stacks = list(host_loader.stack_steps(batches, split_into_calls(4, epoch, start, 12)))
    assert [len(stack.index) for stack in stacks] == sizes
    single = [jax.tree.map(lambda a, i=i: a[i], s) for s in stacks for i in range(len(s.index))]
    _assert_equal(single, _train(dataset, config, total_steps=12)[start:])
    with pytest.raises(StopIteration):
        next(batches)


def test_stacking_closes_the_batches(dataset, config):
    batches = _batches(dataset, config)
    stacks = host_loader.stack_steps(batches, split_into_calls(4, 8, 0, 8))
    next(stacks)
    stacks.close()
    with pytest.raises(StopIteration):
        next(batches)


def test_workers_change_nothing(dataset, config):
    """Two of them; one is among the batches on devices, below."""
    expected = _train(dataset, config)
    _assert_equal(_train(dataset, dataclasses.replace(config, workers=2, prefetch=3)), expected)
    _assert_equal(_train(dataset, dataclasses.replace(config, prefetch=1)), expected)


def test_seed_changes_order_and_augmentation(dataset, config):
    first, other = _train(dataset, config), _train(dataset, config, seed=1)
    assert _order(first) != _order(other)
    by_record = [
        {int(r): i for b in batches for i, r in zip(b.image, b.index, strict=True)}
        for batches in (first, other)
    ]
    assert any(np.any(by_record[0][r] != by_record[1][r]) for r in range(5))


def test_augmentation_differs_between_epochs_and_records(dataset, config, monkeypatch):
    drawn = []
    draw = samples.draw_transform

    def spy(augmentation, rng) -> Transform:
        drawn.append(draw(augmentation, rng))
        return drawn[-1]

    monkeypatch.setattr(samples, "draw_transform", spy)
    always = AugmentationConfig(affine_probability=1)
    _train(dataset, config, always, total_steps=20)
    assert len(drawn) == len(set(drawn)) == 40


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_share_each_batch(dataset, config, shards: int):
    whole = _train(dataset, config, batch_size=4)
    parts = [_train(dataset, config, batch_size=4, shard=(i, shards)) for i in range(shards)]
    joined = [
        jax.tree.map(lambda *rows: np.concatenate(rows), *batches)
        for batches in zip(*parts, strict=True)
    ]
    _assert_equal(joined, whole)


def test_impossible_batches(dataset, config):
    with pytest.raises(InputError, match=r"batch_size is 6, but only 5 images"):
        _train(dataset, config, batch_size=6)
    with pytest.raises(InputError, match=r"batch_size is 3, not a multiple of 2"):
        _train(dataset, config, batch_size=3, shard=(0, 2))


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 7])
def test_evaluation_counts_every_image_once(dataset, config, batch_size: int):
    indices = [5, 0, 3, 1, 2]
    batches = list(
        host_loader.evaluation_batches(dataset, indices, config, channels=1, batch_size=batch_size)
    )
    assert {batch.image.shape for batch in batches} == {(batch_size, *SIZE, 1)}
    records = np.concatenate([batch.index for batch in batches])
    valid = np.concatenate([batch.valid for batch in batches])
    assert records[valid].tolist() == indices
    assert np.all(records[~valid] == -1)
    assert len(records) - len(indices) < batch_size
    first = resize_image(dataset.record(5).image, SIZE)
    np.testing.assert_array_equal(batches[0].image[0, ..., 0], first)


def test_a_bad_record_is_reported(dataset, config):
    with pytest.raises(ValueError, match="Record key"):
        list(host_loader.evaluation_batches(dataset, [99], config, channels=1, batch_size=1))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_device_batches_equal_host_batches(dataset, config, workers: int):
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    arguments: dict[str, Any] = {"channels": 1, "seed": 0, "batch_size": 8, "total_steps": 6}
    many = list(range(6)) * 2
    host = list(host_loader.training_batches(dataset, many, config, STILL, **arguments))
    config = dataclasses.replace(config, workers=workers)
    batches = prefetch_to_device(
        host_loader.training_batches(dataset, many, config, STILL, **arguments), sharding, size=2
    )
    # All are kept: the memory they came from must not be reused under them.
    device = list(batches)
    image: Any = device[0].image
    assert image.sharding.is_equivalent_to(sharding, 4)
    assert len(image.addressable_shards) == 8
    _assert_equal([jax.device_get(batch) for batch in device], host)


def _slow(count: int, pulled: list[int]) -> Iterator[Batch]:
    for i in range(count):
        time.sleep(0.05)
        pulled.append(i)
        yield Batch(
            image=np.full((8, 4, 4, 1), i, np.uint8),
            mask=np.zeros((8, 4, 4, 1), np.uint8),
            valid=np.ones(8, bool),
            index=np.arange(8, dtype=np.int32),
        )


def test_prefetch_runs_ahead_and_counts_the_wait():
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    pulled = []
    batches = prefetch_to_device(_slow(5, pulled), sharding, size=3)
    seen, start = [], time.perf_counter()
    for batch in batches:
        seen.append((int(jax.device_get(batch.image)[0, 0, 0, 0]), len(pulled)))
        time.sleep(0.1)  # Not waiting for input.
    assert seen == [(0, 3), (1, 4), (2, 5), (3, 5), (4, 5)]
    assert 0.25 <= batches.waited_seconds <= time.perf_counter() - start - 0.5


def test_closing_ends_the_workers(dataset, config):
    config = dataclasses.replace(config, workers=1)
    arguments: dict[str, Any] = {"channels": 1, "seed": 0, "batch_size": 2, "total_steps": 1000}
    sharding = NamedSharding(jax.make_mesh((1,), ("data",)), PartitionSpec("data"))
    batches = prefetch_to_device(
        host_loader.training_batches(dataset, range(5), config, STILL, **arguments), sharding
    )
    next(batches)
    assert len(multiprocessing.active_children()) == 1
    batches.close()
    assert not multiprocessing.active_children()


_SCRIPT = """
import sys
from fetal_flax.config import AugmentationConfig, DataConfig
from fetal_flax.data import datasets as builders
from fetal_flax.data import host_loader

if __name__ == "__main__":
    config = DataConfig(data_dir=sys.argv[1], cache_dir=sys.argv[2], image_size=(32, 32), workers=2)
    batches = host_loader.training_batches(
        builders.open_dataset(config, 0), range(6), config, AugmentationConfig(),
        channels=1, seed=0, batch_size=2, total_steps=50,
    )
    print(next(batches).image.shape)
"""


@pytest.mark.slow
def test_workers_from_a_script_that_stops_early(tiny_hc18: Path, tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    command = [sys.executable, "-W", "error", str(script), str(tiny_hc18), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "(2, 32, 32, 1)\n"
    assert "Error" not in done.stderr
