"""Random flips, rotations, scalings and shifts of a training image and its mask.

Images are augmented after they were resized to the network's size, as in the published recipe;
rotations are thus rotations of the square image that the network sees.

Drawing is ours and only applying is albumentations': a `Compose` of 2.0.8 hands its seed to every
transform, so with a seed per sample all of them would draw the same numbers, and an image would
be flipped exactly when it is rotated, scaled and shifted. It also keeps its state in the object,
which threads would share.
"""

import dataclasses
import os
import sys

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from fetal_flax.config import AugmentationConfig
from fetal_flax.data.photometric import UNCHANGED, Photometric, draw_photometric

# When imported, albumentations asks PyPI for news and loads PyTorch where that is installed.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
sys.modules["albumentations.pytorch"] = None  # pyright: ignore
import albumentations  # noqa: E402
from albumentations.augmentations.geometric import functional  # noqa: E402

del sys.modules["albumentations.pytorch"]

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
