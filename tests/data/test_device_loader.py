import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fetal_flax.config import AugmentationConfig, DataConfig
from fetal_flax.data import datasets as builders
from fetal_flax.data import hc18, host_loader
from fetal_flax.data.augmentation import Transform, apply_transform, draw_transform, sampling_matrix
from fetal_flax.data.batch import Batch, BatchRecipe, DeviceDataset
from fetal_flax.data.class_balance import foreground_pixels
from fetal_flax.data.device_loader import (
    device_foreground_pixels,
    evaluation_recipes,
    gather_batch,
    load_device_dataset,
    training_recipes,
)
from fetal_flax.data.images import resize_image, resize_mask
from fetal_flax.data.order import TrainingOrder, split_into_calls
from fetal_flax.training.sharding import create_mesh, replicated

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = (64, 96)
MOVING, STILL = AugmentationConfig(affine_probability=1.0), AugmentationConfig(enabled=False)


@pytest.fixture
def dataset(tiny_hc18, tmp_path) -> builders.Dataset:
    config = DataConfig(data_dir=str(tiny_hc18), cache_dir=str(tmp_path / "cache"))
    return builders.open_dataset(config, seed=0)


@pytest.fixture
def images_on_device(dataset) -> DeviceDataset:
    return load_device_dataset(dataset, SIZE, replicated(create_mesh()))


take = jax.jit(gather_batch, static_argnames=("channels", "soft_masks"))


def batches(
    images_on_device: DeviceDataset, recipes, channels: int = 1, *, soft_masks: bool = False
) -> list[Batch]:
    def row(recipe: BatchRecipe, step: int) -> BatchRecipe:
        return jax.tree.map(lambda array: array[step], recipe)

    return [
        jax.device_get(take(images_on_device, row(recipe, step), channels, soft_masks=soft_masks))
        for recipe in recipes
        for step in range(len(recipe.indices))
    ]


def test_the_devices_hold_the_resized_records(dataset, images_on_device):
    assert images_on_device.image.shape == images_on_device.mask.shape == (len(dataset), *SIZE)
    assert images_on_device.image.dtype == images_on_device.mask.dtype == np.uint8
    for index in range(len(dataset)):
        record = dataset.record(index)
        np.testing.assert_array_equal(
            images_on_device.image[index], resize_image(record.image, SIZE)
        )
        np.testing.assert_array_equal(
            255 * images_on_device.mask[index], resize_mask(record.mask, SIZE)
        )


def test_foreground_is_what_the_host_counts(dataset, images_on_device):
    counts = device_foreground_pixels(images_on_device)
    np.testing.assert_array_equal(counts, foreground_pixels(dataset, SIZE))


@pytest.mark.parametrize("augmentation", [MOVING, STILL], ids=["moving", "still"])
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_those_of_the_host(dataset, images_on_device, augmentation, channels):
    """Ten steps are five epochs: two whole batches of two, the fifth image sits out."""
    config = DataConfig(image_size=SIZE, workers=0)
    flags = {"channels": channels, "seed": 3, "batch_size": 2, "total_steps": 10}
    hosts = list(host_loader.training_batches(dataset, range(5), config, augmentation, **flags))
    order = TrainingOrder(tuple(range(5)), augmentation, seed=3, batch_size=2)
    recipes = training_recipes(order, SIZE, split_into_calls(2, 2, 0, 10))
    ours = batches(images_on_device, recipes, channels)
    assert len(ours) == len(hosts) == 10
    for own, host in zip(ours, hosts, strict=True):
        np.testing.assert_array_equal(own.index, host.index)
        np.testing.assert_array_equal(own.valid, host.valid)
        assert own.image.dtype == own.mask.dtype == np.uint8
        difference = np.abs(own.image.astype(int) - host.image)
        assert difference.max() <= (1 if augmentation is MOVING else 0)
        assert difference.mean() < 0.01
        assert (own.mask != host.mask).mean() < 1e-3


def test_soft_masks_and_grey_levels_vary_as_the_hosts_do(dataset):
    varied = dataclasses.replace(MOVING, gain=0.3, gamma=0.5, speckle=0.2)
    config = DataConfig(image_size=SIZE, workers=0, soft_masks=True)
    flags: dict[str, Any] = {"channels": 1, "seed": 3, "batch_size": 2, "total_steps": 4}
    hosts = list(host_loader.training_batches(dataset, range(5), config, varied, **flags))
    order = TrainingOrder(tuple(range(5)), varied, seed=3, batch_size=2)
    recipes = training_recipes(order, SIZE, split_into_calls(2, 2, 0, 4))
    soft = load_device_dataset(dataset, SIZE, replicated(create_mesh()), soft_masks=True)
    for own, host in zip(batches(soft, recipes, soft_masks=True), hosts, strict=True):
        assert 0 < ((host.mask > 0) & (host.mask < 255)).mean() < 0.1
        assert np.abs(own.mask.astype(int) - host.mask).max() <= 1
        jax.tree.map(np.testing.assert_array_equal, own.photometric, host.photometric)


def test_recipes_of_any_length_and_start_take_the_same(dataset, images_on_device):
    order = TrainingOrder((0, 2, 3, 5), MOVING, seed=1, batch_size=2)

    def recipe(steps: int, start: int, shard: tuple[int, int] = (0, 1)) -> BatchRecipe:
        recipes = training_recipes(order, SIZE, split_into_calls(steps, 8, start, 8), shard)
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *recipes)

    whole = recipe(8, 0)
    for start in (0, 3, 4, 5):
        for steps in (1, 2, 3, 4):
            rest = jax.tree.map(lambda array, start=start: array[start:], whole)
            jax.tree.map(np.testing.assert_array_equal, recipe(steps, start), rest)
    shares = [recipe(4, 0, (position, 2)) for position in range(2)]
    together = jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=1), *shares)
    jax.tree.map(np.testing.assert_array_equal, together, whole)
    assert set(whole.indices.ravel().tolist()) <= {0, 2, 3, 5}


@pytest.mark.slow
def test_the_warp_is_albumentations_own_on_real_images(hc18_sample):
    warp = jax.jit(gather_batch, static_argnames="channels")
    for number, record in enumerate(hc18_sample[::5]):
        native, mask = hc18.load(record)
        image, mask = resize_image(native, (256, 256)), resize_mask(mask, (256, 256))
        transform = draw_transform(MOVING, np.random.default_rng(number))
        expected, expected_mask = apply_transform(transform, image, mask)
        matrix = sampling_matrix(transform, image.shape).astype(np.float32)
        images_on_device = DeviceDataset(jnp.asarray(image[None]), jnp.asarray(mask[None] // 255))
        batch = warp(images_on_device, BatchRecipe(np.zeros(1, np.int32), matrix[None]), channels=1)
        difference = np.abs(np.asarray(batch.image)[0, ..., 0].astype(int) - expected)
        assert difference.max() <= 1 and difference.mean() < 0.01
        assert (np.asarray(batch.mask)[0, ..., 0] != expected_mask // 255).mean() < 1e-4


@pytest.mark.parametrize(
    "transform",
    [Transform(), Transform(flip=True), Transform(shift=(3 / 64, -6 / 96))],
    ids=["none", "flip", "shift"],
)
def test_what_meets_the_pixels_is_exact(images_on_device, transform):
    image, mask = (np.asarray(array[0]) for array in images_on_device)
    matrix = sampling_matrix(transform, SIZE).astype(np.float32)
    batch = take(images_on_device, BatchRecipe(np.zeros(1, np.int32), matrix[None]), 1)
    expected, expected_mask = apply_transform(transform, image, mask)
    np.testing.assert_array_equal(batch.image[0, ..., 0], expected)
    np.testing.assert_array_equal(batch.mask[0, ..., 0], expected_mask)


def test_an_evaluation_takes_every_record_once_and_marks_the_padding(dataset, images_on_device):
    recipes = list(evaluation_recipes((1, 4, 5), batch_size=2))
    assert [recipe.indices.tolist() for recipe in recipes] == [[[1, 4]], [[5, -1]]]
    first, last = batches(images_on_device, recipes)
    assert first.valid.tolist() == [True, True] and last.valid.tolist() == [True, False]
    np.testing.assert_array_equal(first.image[1, ..., 0], images_on_device.image[4])
    np.testing.assert_array_equal(last.mask[0, ..., 0], images_on_device.mask[5])
