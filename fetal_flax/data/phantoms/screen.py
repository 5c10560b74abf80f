"""The picture on the screen: the raster converted to pixels, and the marks burnt in."""

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from fetal_flax.data.phantoms.geometry import REFERENCE_HEIGHT, REFERENCE_WIDTH, Raster


def scan_convert(
    screen: Float32[np.ndarray, "depths beams"],
    raster: Raster,
    height: int,
    width: int,
    scale: float,
) -> UInt8[np.ndarray, "height width"]:
    """Resamples the raster to pixels; outside the sector the image is black."""
    columns, rows = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
    x = (columns + 0.5 - width / 2) / scale + REFERENCE_WIDTH / 2 - 0.5
    y = (rows + 0.5 - height / 2) / scale + REFERENCE_HEIGHT / 2 - 0.5
    beam, depth = raster.index(x[None, :].astype(np.float32), y[:, None].astype(np.float32))
    image = cv2.remap(
        screen, beam.astype(np.float32), depth.astype(np.float32), cv2.INTER_LINEAR, borderValue=0
    )
    return image.round().astype(np.uint8)


def burn_in(rng: np.random.Generator, image: UInt8[np.ndarray, "height width"]) -> None:
    """Draws the marks of the screen over the image, in place.

    HC18 has a gray-scale bar on the left and black boxes where text was removed.
    """
    if rng.random() < 0.6:
        _fill(image, 0, rng.uniform(0.75, 0.9), rng.uniform(0.77, 0.87), 1.0, 1.0)
    if rng.random() < 0.2:
        _fill(image, 0, 0.0, rng.uniform(0.82, 0.92), rng.uniform(0.1, 0.2), 1.0)
    if rng.random() < 0.9:
        _gray_bar(image)
    _glyphs(rng, image, 0.035, 0.08, 0.03, int(rng.integers(20, 50)))
    if rng.random() < 0.15:
        _depth_ticks(image)
    if rng.random() < 0.1:
        _glyphs(rng, image, 0.96, 0.05, 0.2, int(rng.integers(80, 200)))


def _fill(
    image: UInt8[np.ndarray, "height width"],
    value: int,
    top: float,
    left: float,
    bottom: float,
    right: float,
) -> None:
    """Fills a box whose edges are shares of the image."""
    height, width = image.shape
    rows = slice(round(top * height), round(bottom * height))
    image[rows, round(left * width) : round(right * width)] = value


def _gray_bar(image: UInt8[np.ndarray, "height width"]) -> None:
    """Draws the gray-scale bar down the left margin."""
    height, width = image.shape
    top, bottom = round(0.045 * height), round(0.34 * height)
    ramp = np.linspace(250, 5, bottom - top).astype(np.uint8)
    image[top:bottom, : max(1, round(0.009 * width))] = ramp[:, None]


def _depth_ticks(image: UInt8[np.ndarray, "height width"]) -> None:
    """Draws the depth scale down the right margin."""
    height, width = image.shape
    rows = np.linspace(0.05, 0.95, 10) * height
    image[rows.astype(int), width - max(2, round(0.012 * width)) :] = 140


def _glyphs(
    rng: np.random.Generator,
    image: UInt8[np.ndarray, "height width"],
    top: float,
    left: float,
    length: float,
    value: int,
) -> None:
    """Draws a line of random blocks that reads as small text; places are shares of the image."""
    height, width = image.shape
    ink = (rng.random((5, 24)) < 0.5).astype(np.uint8)
    ink[:, 3::4] = 0
    size = (max(1, round(length * width)), max(1, round(0.02 * height)))
    ink = cv2.resize(ink, size, interpolation=cv2.INTER_NEAREST)
    row, column = round(top * height), round(left * width)
    patch = image[row : row + size[1], column : column + size[0]]
    np.maximum(patch, ink[: patch.shape[0], : patch.shape[1]] * np.uint8(value), out=patch)
