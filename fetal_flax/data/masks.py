"""From HC18's annotations, one-pixel ellipse outlines, to filled masks at native size."""

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

from fetal_flax.errors import InputError

_SMALLEST_SHARE = 0.005  # HC18's smallest head covers 3.7 % of its image.
_SMALLEST_AGREEMENT = 0.98  # Dice with the fitted ellipse; HC18's lowest is 0.999.
_CLOSINGS = (1, 3, 5)  # Sizes in pixels; 1 leaves the outline as it is.


def fill_outline(
    outline: UInt8[np.ndarray, "height width"],
) -> UInt8[np.ndarray, "height width"]:
    """Fills an ellipse outline, at its native size (a resized outline has holes).

    The image's edge counts as part of the outline, so a head that leaves the image is closed
    along the edge. The outline cuts the rest of the image into regions; those that lie mostly
    in the ellipse fitted to the outline are head. An outline with gaps of a few pixels is
    closed first.

    Args:
        outline: The outline's pixels are above 127.

    Returns:
        The mask, 255 in the head (outline included), 0 outside.

    Raises:
        InputError: Nothing in the image can be filled; the message is to follow the file's name.
    """
    line = outline > 127
    if np.count_nonzero(line) < 5:
        raise InputError("holds no outline: expected a white ellipse on black")
    ellipse = _fitted_ellipse(line)
    if not _SMALLEST_SHARE * line.size < np.count_nonzero(ellipse) < line.size:
        raise InputError("holds no head-sized outline: expected a white ellipse on black")
    for size in _CLOSINGS:
        closed = _close_gaps(line, size)
        mask = _regions_within(closed, ellipse) | line
        if _dice(mask, ellipse) >= _SMALLEST_AGREEMENT:
            return mask.astype(np.uint8) * 255
    raise InputError("holds no closed ellipse outline: it has a gap, or another shape")


def _fitted_ellipse(line: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    """Returns the filled ellipse through the outline's pixels, cut off at the image's edge."""
    rows, columns = np.nonzero(line)
    center, axes, angle = cv2.fitEllipse(np.stack([columns, rows], 1).astype(np.float32))
    filled = np.zeros(line.shape, np.uint8)
    if np.all(np.isfinite([*center, *axes])) and 0 < max(axes) < 4 * max(line.shape):
        cv2.ellipse(filled, (center, axes, angle), 1, thickness=cv2.FILLED)
    return filled.astype(bool)


def _close_gaps(
    line: Bool[np.ndarray, "height width"], size: int
) -> Bool[np.ndarray, "height width"]:
    """Joins pieces of the outline that lie fewer than `size` pixels apart."""
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    return cv2.morphologyEx(line.astype(np.uint8), cv2.MORPH_CLOSE, disk).astype(bool)


def _regions_within(
    line: Bool[np.ndarray, "height width"], ellipse: Bool[np.ndarray, "height width"]
) -> Bool[np.ndarray, "height width"]:
    """Returns the regions between outline and image edge of which most lies in `ellipse`."""
    # Connectivity 4: a diagonal step of the outline is no opening.
    count, regions = cv2.connectedComponents((~line).astype(np.uint8), connectivity=4)
    labels = regions.astype(np.intp)
    inside = np.bincount(labels[ellipse], minlength=count)
    head = 2 * inside > np.bincount(labels.ravel(), minlength=count)
    head[0] = True  # The outline itself.
    return head[labels]


def _dice(a: Bool[np.ndarray, "height width"], b: Bool[np.ndarray, "height width"]) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))
