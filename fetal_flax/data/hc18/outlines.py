"""From HC18's annotations, one-pixel ellipse outlines, to filled masks at native size.

Copies of HC18 often hold masks that somebody has filled already, some with 1 in the head; they are
taken as they are.
"""

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

from fetal_flax.errors import InputError
from fetal_flax.measurement.head import (
    OUTLINE_PX,
    edge_points,
    fill_holes,
    fit_ellipse,
    largest_region,
    measure_head,
)

_SMALLEST_SHARE = 0.005  # HC18's smallest head covers 3.7 % of its image.
_SMALLEST_AGREEMENT = 0.98  # Dice with the fitted ellipse; HC18's lowest is 0.999.
_BRUSHES = (1, 3, 5)  # Pixels; 1 leaves the outline as it is, 5 closes gaps of 4.
_FILLED_SHARE = 0.5  # Of the region that an annotation encloses; an outline has a few percent.
_SMALLEST_AGREEMENT_OF_MASKS = 0.9  # They may be drawn by hand.
_LARGEST_CONTRADICTION = 0.04  # Of the circumference; HC18's own largest is 0.007.


def fill_outline(
    outline: UInt8[np.ndarray, "height width"],
) -> UInt8[np.ndarray, "height width"]:
    """Fills an ellipse outline, at its native size (a resized outline has holes).

    The image's edge counts as part of the outline, so a head that leaves the image is closed
    along the edge. The outline cuts the rest of the image into regions; those that lie mostly
    in the ellipse fitted to the outline are head. If the outline has a gap, a thicker brush
    closes it first. A mask that is filled already loses its holes alone.

    Args:
        outline: The outline's pixels are above 127, or, where none are, above half the brightest.

    Returns:
        The mask, 255 in the head (outline included), 0 outside.

    Raises:
        InputError: Nothing in the image can be filled; the message is to follow the file's name.
    """
    line = outline > min(127, int(outline.max(initial=0)) // 2)
    if np.count_nonzero(line) < 5:
        raise InputError("holds no outline: expected a white ellipse on black")
    if line.all():
        raise InputError("is white all over: expected a white ellipse on black")
    if (mask := _filled_already(line)) is not None:
        return mask.astype(np.uint8) * 255
    ellipse = _fitted_ellipse(line)
    area = np.count_nonzero(ellipse)
    if area < max(_SMALLEST_SHARE * line.size, 2 * np.count_nonzero(line)) or area == line.size:
        raise InputError("holds no head-sized outline: expected a white ellipse on black")
    for size in _BRUSHES:
        # What the brush takes from the head's inside is given back.
        brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
        mask = _dilate(_regions_within(_dilate(line, brush), ellipse), brush) | line
        if _dice(mask, ellipse) >= _SMALLEST_AGREEMENT:
            return mask.astype(np.uint8) * 255
    raise InputError("holds no closed ellipse outline: it has a gap, or another shape")


def contradiction(
    mask: Bool[np.ndarray, "height width"], pixel_size_mm: float, circumference_mm: float
) -> str | None:
    """Returns what is wrong where an annotation and its row in the CSV contradict each other.

    One circumference for all images, annotations that were swapped, or a wrong pixel size: each
    would go into every figure without a word.

    Args:
        mask: True inside the annotated outline.
        pixel_size_mm: The image's, of the CSV.
        circumference_mm: The head's, of the CSV.

    Returns:
        The end of a sentence about the image; None where both agree to a few percent.
    """
    head = measure_head(mask, outline_px=OUTLINE_PX["hc18"])
    measured = head.in_mm(pixel_size_mm).circumference if head else 0.0
    if abs(measured - circumference_mm) <= _LARGEST_CONTRADICTION * circumference_mm:
        return None
    return f"has {circumference_mm:.1f} mm in the CSV and {measured:.1f} mm by its annotation"


def _filled_already(
    line: Bool[np.ndarray, "height width"],
) -> Bool[np.ndarray, "height width"] | None:
    """Returns the mask that an annotation is already, without its holes; None for an outline."""
    region, _ = largest_region(line)
    area = np.count_nonzero(region)
    if area < _SMALLEST_SHARE * line.size:
        return None
    if np.count_nonzero(line & region) < _FILLED_SHARE * area:
        return None
    ellipse = fit_ellipse(edge_points(region)[0])
    if ellipse is None:
        return None
    fitted = ellipse.filled(*line.shape) > 0
    return fill_holes(line) if _dice(region, fitted) >= _SMALLEST_AGREEMENT_OF_MASKS else None


def _fitted_ellipse(line: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    """Returns the filled ellipse through the outline's pixels, cut off at the image's edge."""
    rows, columns = np.nonzero(line)
    center, axes, angle = cv2.fitEllipse(np.stack([columns, rows], 1).astype(np.float32))
    filled = np.zeros(line.shape, np.uint8)
    if np.all(np.isfinite([*center, *axes])) and 0 < max(axes) < 4 * max(line.shape):
        cv2.ellipse(filled, (center, axes, angle), 1, thickness=cv2.FILLED)
    return filled.astype(bool)


def _regions_within(
    line: Bool[np.ndarray, "height width"], ellipse: Bool[np.ndarray, "height width"]
) -> Bool[np.ndarray, "height width"]:
    """Returns the regions between outline and image edge of which most lies in `ellipse`."""
    # Connectivity 4: a diagonal step of the outline is no opening.
    count, regions = cv2.connectedComponents((~line).astype(np.uint8), connectivity=4)
    labels = regions.astype(np.intp)
    inside = np.bincount(labels[ellipse], minlength=count)
    head = 2 * inside > np.bincount(labels.ravel(), minlength=count)
    head[0] = False  # The outline itself.
    return head[labels]


def _dilate(
    region: Bool[np.ndarray, "height width"], brush: UInt8[np.ndarray, "size size"]
) -> Bool[np.ndarray, "height width"]:
    return cv2.dilate(region.astype(np.uint8), brush).astype(bool)


def _dice(a: Bool[np.ndarray, "height width"], b: Bool[np.ndarray, "height width"]) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))
