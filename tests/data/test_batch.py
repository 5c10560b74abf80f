import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fetal_flax.config import AugmentationConfig
from fetal_flax.data import hc18
from fetal_flax.data.batch import BatchRecipe, DeviceDataset, gather_batch
from fetal_flax.data.images import resize_image, resize_mask
from fetal_flax.data.samples import Transform, apply_transform, draw_transform, sampling_matrix

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = (64, 96)
MOVING = AugmentationConfig(affine_probability=1.0)

take = jax.jit(gather_batch, static_argnames="channels")


@pytest.mark.slow
def test_the_warp_is_albumentations_own_on_real_images(hc18_sample):
    for number, record in enumerate(hc18_sample[::5]):
        native, mask = hc18.load(record)
        image, mask = resize_image(native, (256, 256)), resize_mask(mask, (256, 256))
        transform = draw_transform(MOVING, np.random.default_rng(number))
        expected, expected_mask = apply_transform(transform, image, mask)
        matrix = sampling_matrix(transform, image.shape).astype(np.float32)
        images_on_device = DeviceDataset(jnp.asarray(image[None]), jnp.asarray(mask[None] // 255))
        batch = take(images_on_device, BatchRecipe(np.zeros(1, np.int32), matrix[None]), channels=1)
        difference = np.abs(np.asarray(batch.image)[0, ..., 0].astype(int) - expected)
        assert difference.max() <= 1 and difference.mean() < 0.01
        assert (np.asarray(batch.mask)[0, ..., 0] != expected_mask // 255).mean() < 1e-4


@pytest.mark.parametrize(
    "transform",
    [Transform(), Transform(flip=True), Transform(shift=(3 / 64, -6 / 96))],
    ids=["none", "flip", "shift"],
)
def test_what_meets_the_pixels_is_exact(transform):
    image = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    mask = (image > 127).astype(np.uint8)
    images_on_device = DeviceDataset(jnp.asarray(image[None]), jnp.asarray(mask[None]))
    matrix = sampling_matrix(transform, SIZE).astype(np.float32)
    batch = take(images_on_device, BatchRecipe(np.zeros(1, np.int32), matrix[None]), channels=1)
    expected, expected_mask = apply_transform(transform, image, mask)
    np.testing.assert_array_equal(batch.image[0, ..., 0], expected)
    np.testing.assert_array_equal(batch.mask[0, ..., 0], expected_mask)
