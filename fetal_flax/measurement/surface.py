"""How far the outlines of predicted and annotated masks lie apart, in millimetres."""

import math

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.spatial import KDTree

from fetal_flax.measurement.overlap import check_masks


def surface_distances(
    prediction: Bool[np.ndarray, "height width"],
    truth: Bool[np.ndarray, "height width"],
    pixel_size_mm: float,
) -> dict[str, float]:
    """Returns the distances between the boundaries of a predicted and an annotated mask, in mm.

    A mask's boundary is those of its pixels that have at least one of their four neighbours
    outside the mask; beyond the image everything is outside. Every boundary pixel of one mask
    has a distance to the other mask: from its centre to that of the nearest boundary pixel there.

    `hausdorff_mm` is the largest distance, `hausdorff95_mm` the larger of the two masks' 95th
    percentiles (interpolated linearly) and `assd_mm` (average symmetric surface distance) the
    mean over the boundary pixels of both. All are 0 when both masks are empty (the prediction is
    right); when only one is, all are the largest distance that the image has room for, between
    the centres of opposite corners.

    HC18's paper reports the Hausdorff distance (van den Heuvel et al. 2018, PLoS ONE 13(8):
    e0200412). Definitions: Taha and Hanbury 2015, BMC Medical Imaging 15:29 (Hausdorff distance
    and its quantiles); Heimann et al. 2009, IEEE Transactions on Medical Imaging 28(8):1251-1265
    (ASSD).

    Args:
        prediction: True where the network sees the head.
        truth: True inside the annotated outline.
        pixel_size_mm: Side of a square pixel, in mm.

    Raises:
        ValueError: The masks are not boolean, not 2-D, without pixels, or differ in shape; or the
            pixel size is not positive and finite.
    """
    check_masks(prediction, truth)
    if not (math.isfinite(pixel_size_mm) and pixel_size_mm > 0):
        raise ValueError(f"pixel size must be positive and finite, not {pixel_size_mm} mm")
    predicted, annotated = _boundary(prediction), _boundary(truth)
    if len(predicted) and len(annotated):
        there, back = _nearest(predicted, annotated), _nearest(annotated, predicted)
    else:
        height, width = prediction.shape
        empty = len(predicted) == len(annotated)
        there = back = np.array([0.0 if empty else math.hypot(height - 1, width - 1)])
    distances = {
        "hausdorff_mm": max(there.max(), back.max()),
        "hausdorff95_mm": max(np.percentile(there, 95), np.percentile(back, 95)),
        "assd_mm": np.concatenate([there, back]).mean(),
    }
    return {name: float(pixels) * pixel_size_mm for name, pixels in distances.items()}


def _boundary(mask: Bool[np.ndarray, "height width"]) -> Int[np.ndarray, "points 2"]:
    """Returns row and column of the mask's boundary pixels."""
    padded = np.pad(mask, 1)
    rows = padded[:-2, 1:-1] & padded[2:, 1:-1]
    columns = padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(mask & ~(rows & columns))


def _nearest(
    points: Int[np.ndarray, "points 2"], others: Int[np.ndarray, "others 2"]
) -> Float[np.ndarray, " points"]:
    """Returns each point's distance to the nearest of `others`, in pixels."""
    # A tree of the few boundary pixels is faster than a distance transform of the whole image.
    return np.asarray(KDTree(others).query(points)[0])
