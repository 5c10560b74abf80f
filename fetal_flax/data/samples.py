"""The samples of training steps: which image stands in which row of which step, varied how.

Both are pure functions of (seed, step): neither the number of workers nor the step at which a run
was resumed changes them. Both loaders, the host's and the devices', take their samples from here.

Images are flipped, rotated, scaled and shifted after they were resized to the network's size, as in
the published recipe; rotations are thus rotations of the square image that the network sees.

Drawing is ours and only applying is albumentations': a `Compose` of 2.0.8 hands its seed to every
transform, so with a seed per sample all of them would draw the same numbers, and an image would
be flipped exactly when it is rotated, scaled and shifted. It also keeps its state in the object,
which threads would share.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Iterator

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from fetal_flax.config import AugmentationConfig
from fetal_flax.data.photometric import UNCHANGED, Photometric, draw_photometric
from fetal_flax.errors import InputError

# When imported, albumentations asks PyPI for news and loads PyTorch where that is installed.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
sys.modules["albumentations.pytorch"] = None  # pyright: ignore
import albumentations  # noqa: E402
from albumentations.augmentations.geometric import functional  # noqa: E402

del sys.modules["albumentations.pytorch"]

# What a random number is for; it keeps the streams of one seed apart.
_FOR_ORDER, _FOR_AUGMENTATION = 0, 1

_FLIP = albumentations.HorizontalFlip(p=1)
_WARP = albumentations.Affine(
    interpolation=cv2.INTER_LINEAR,
    mask_interpolation=cv2.INTER_NEAREST,
    border_mode=cv2.BORDER_CONSTANT,
    fill=0,
    fill_mask=0,
    p=1,
)


@dataclasses.dataclass(frozen=True)
class Transform:
    """What is done to one image."""

    flip: bool = False
    rotation_degrees: float = 0.0
    scale: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    """Down and right, as a share of height and width."""
    photometric: Photometric = UNCHANGED
    """What the step on the devices does to the grey levels."""


@dataclasses.dataclass(frozen=True)
class TrainingOrder:
    """Which image stands in which row of which step, and how it is varied there.

    Raises:
        InputError: There are fewer images than a batch takes.
    """

    indices: tuple[int, ...]
    """Records to train on."""
    augmentation: AugmentationConfig
    seed: int
    batch_size: int
    """Images per step, over all devices together."""

    def __post_init__(self) -> None:
        steps_per_epoch(len(self.indices), self.batch_size)

    def sample(self, step: int, row: int) -> tuple[int, Transform]:
        """Returns index and transform of a row of a step, counted from the start of the run."""
        epoch, step = divmod(step, steps_per_epoch(len(self.indices), self.batch_size))
        order = _epoch_order(self.seed, epoch, len(self.indices))
        index = self.indices[order[step * self.batch_size + row]]
        if not self.augmentation.enabled:
            return index, Transform()
        rng = np.random.default_rng([self.seed, epoch, _FOR_AUGMENTATION, index])
        return index, draw_transform(self.augmentation, rng)


def steps_per_epoch(image_count: int, batch_size: int) -> int:
    """Returns how many whole batches an epoch has; the images left over sit it out.

    Raises:
        InputError: There are fewer images than a batch takes.
    """
    if image_count < batch_size:
        raise InputError(
            f"setting schedule.batch_size is {batch_size}, but only {image_count} images train"
        )
    return image_count // batch_size


def split_into_calls(
    steps: int, epoch_steps: int, start_step: int, total_steps: int
) -> Iterator[range]:
    """Yields the steps of each call, from `start_step` up to `total_steps`.

    Args:
        steps: Steps per call. An epoch's last may do fewer, and the first one where an epoch has
            begun: calls begin at an epoch's multiples of it.
        epoch_steps: Steps per epoch.
        start_step: The first step.
        total_steps: The step to stop before, an epoch's end.
    """
    first = start_step
    while first < total_steps:
        done = first % epoch_steps
        last = first + min(steps - done % steps, epoch_steps - done)
        yield range(first, last)
        first = last


def shard_rows(batch_size: int, shard: tuple[int, int]) -> range:
    """Returns the rows of a batch that are a process's own.

    Args:
        batch_size: Images per step, over all shards together.
        shard: The process's position among the processes, and their number.

    Raises:
        InputError: The processes can't share the batch evenly.
    """
    position, shards = shard
    if batch_size % shards:
        raise InputError(
            f"setting schedule.batch_size is {batch_size}, not a multiple of {shards} processes"
        )
    return range(position * batch_size // shards, (position + 1) * batch_size // shards)


def draw_transform(config: AugmentationConfig, rng: np.random.Generator) -> Transform:
    """Draws each part of a transform on its own, uniformly within its range."""
    # All numbers are drawn whether used or not: a probability doesn't change the other parts.
    flips, rotates, scales, shifts = rng.random(4)
    rotation, scale, down, right = rng.uniform(-1, 1, 4)
    transform = Transform(flip=bool(flips < config.flip_probability))
    if rotates < config.affine_probability:
        degrees = float(rotation * config.rotation_degrees)
        transform = dataclasses.replace(transform, rotation_degrees=degrees)
    if scales < config.affine_probability:
        transform = dataclasses.replace(transform, scale=float(1 + scale * config.scale))
    if shifts < config.affine_probability:
        shift = (float(down * config.translation), float(right * config.translation))
        transform = dataclasses.replace(transform, shift=shift)
    if config.photometric:
        transform = dataclasses.replace(transform, photometric=draw_photometric(config, rng))
    return transform


def apply_transform(
    transform: Transform,
    image: UInt8[np.ndarray, "height width"],
    mask: UInt8[np.ndarray, "height width"],
    *,
    soft: bool = False,
) -> tuple[UInt8[np.ndarray, "height width"], UInt8[np.ndarray, "height width"]]:
    """Applies a transform's geometry to an image (bilinear) and its mask; 0 fills the outside.

    Rotation, scaling and shift are one warp, so that the image is interpolated once.

    Args:
        transform: What is done; its photometric part is left to the step.
        image: The image.
        mask: The mask, nearest neighbours of which are taken unless it is `soft`.
        soft: The mask holds shares of pixels and is interpolated as the image is.
    """
    if transform.flip:
        image, mask = _FLIP.apply(image), _FLIP.apply_to_mask(mask)
    matrix = _affine(transform, image.shape)
    image = _WARP.apply(image, matrix=matrix, output_shape=image.shape)
    warp_mask = _WARP.apply if soft else _WARP.apply_to_mask
    mask = warp_mask(mask, matrix=matrix, output_shape=mask.shape)
    return np.ascontiguousarray(image), np.ascontiguousarray(mask)


def sampling_matrix(transform: Transform, shape: tuple[int, int]) -> Float64[np.ndarray, "2 3"]:
    """Returns where `apply_transform` takes each pixel from: flip and warp as one matrix.

    Args:
        transform: What is done.
        shape: Height and width of the image.

    Returns:
        What (x, y, 1) of a pixel of the result has to be multiplied by to give the (x, y) in the
        image that it shows.
    """
    backward = np.linalg.inv(_affine(transform, shape))
    if transform.flip:
        backward = np.array([[-1.0, 0, shape[1] - 1], [0, 1, 0], [0, 0, 1]]) @ backward
    return backward[:2]


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    """Returns the order of an epoch's images."""
    order = np.random.default_rng([seed, epoch, _FOR_ORDER]).permutation(count)
    return tuple(order.tolist())


def _affine(transform: Transform, shape: tuple[int, int]) -> Float64[np.ndarray, "3 3"]:
    """Returns rotation, scaling and shift about the image's centre, from image to result."""
    height, width = shape
    return functional.create_affine_transformation_matrix(
        translate={"x": transform.shift[1] * width, "y": transform.shift[0] * height},
        shear={"x": 0, "y": 0},
        scale={"x": transform.scale, "y": transform.scale},
        rotate=transform.rotation_degrees,
        shift=functional.center(shape),
    )
