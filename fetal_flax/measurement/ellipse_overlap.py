"""How well the ellipse of a predicted mask's largest region matches the annotated mask.

A submission to the HC18 challenge is an ellipse for each image (`inference/submission.py`), and the
field reports the ellipses' overlap and distances (van den Heuvel et al. 2018, PLoS ONE 13(8):
e0200412). docs/measurement.md defines ours.
"""

import numpy as np
from jaxtyping import Bool

from fetal_flax.measurement.head import Head, measure_head
from fetal_flax.measurement.overlap import check_masks, segmentation_metrics
from fetal_flax.measurement.surface import surface_distances


def ellipse_metrics(
    head: Head | None, truth: Bool[np.ndarray, "height width"], pixel_size_mm: float
) -> dict[str, float]:
    """Returns the overlap and the distances of a head's ellipse and an annotated mask.

    `ellipse_dice`, in [0, 1], is as in `segmentation_metrics`; `ellipse_hausdorff_mm`,
    `ellipse_hausdorff95_mm` and `ellipse_assd_mm` are as in `surface_distances`. The ellipse is
    filled by `ellipse_mask`. A head that was missed has the worst values, as an empty mask has.

    Args:
        head: What `measure_head` found in the predicted mask.
        truth: True inside the annotated outline.
        pixel_size_mm: Side of a square pixel, in mm.

    Raises:
        ValueError: The annotated mask is not boolean, not 2-D or without pixels; or the pixel size
            is not positive and finite.
    """
    filled = ellipse_mask(head, truth.shape)
    dice = segmentation_metrics(filled, truth)["dice"]
    metrics = {"dice": dice} | surface_distances(filled, truth, pixel_size_mm)
    return {f"ellipse_{name}": value for name, value in metrics.items()}


def ellipse_dice(
    mask: Bool[np.ndarray, "height width"], truth: Bool[np.ndarray, "height width"]
) -> float:
    """Returns the Dice, in [0, 1], of the ellipse of a mask's largest region and a mask.

    The ellipse is fitted by least squares to the region's edge, filled, and clipped to the image.

    Args:
        mask: True where the network sees the head.
        truth: True inside the annotated outline; of the same size, which may be any.

    Returns:
        Where no ellipse can be fitted, 0 (1 if `truth` is empty too).

    Raises:
        ValueError: The masks are not boolean, not 2-D, without pixels, or differ in shape.
    """
    check_masks(mask, truth)
    head = measure_head(mask, outline_px=0.0)
    return segmentation_metrics(ellipse_mask(head, truth.shape), truth)["dice"]


def ellipse_mask(head: Head | None, shape: tuple[int, ...]) -> Bool[np.ndarray, "height width"]:
    """Returns the mask that a head's ellipse fills, clipped to the image; empty for None.

    It is the ellipse of the edge: the masks it is compared with hold the outline too.

    Args:
        head: What `measure_head` found.
        shape: Height and width of the mask it was found in.
    """
    if head is None:
        return np.zeros(shape, bool)
    return head.edge_ellipse.filled(*shape) > 0
