"""How well predicted masks match the annotated ones, at the images' native size.

The metrics of one image are a dict of numbers by name, so that other measurements of the same
image (distances, head circumference) join by merging dicts; `aggregate` takes whatever is there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from fetal_flax.errors import InputError

RESAMPLINGS = 2000


def segmentation_metrics(
    prediction: Bool[np.ndarray, "height width"], truth: Bool[np.ndarray, "height width"]
) -> dict[str, float]:
    """Returns the overlap of a predicted and an annotated mask, each metric in [0, 1].

    `dice` is 2 |P and T| / (|P| + |T|) and `iou` |P and T| / |P or T|, without smoothing; both
    are 1 when both masks are empty (the prediction is right) and 0 when only one is.
    `pixel_accuracy` is the share of pixels, background included, on which the masks agree.
    `precision` is |P and T| / |P| and `recall` |P and T| / |T|, with empty masks as for `dice`.

    Args:
        prediction: True where the network sees the head.
        truth: True inside the annotated outline.

    Raises:
        ValueError: The masks are not boolean, not 2-D, without pixels, or differ in shape.
    """
    check_masks(prediction, truth)
    predicted, annotated = int(np.count_nonzero(prediction)), int(np.count_nonzero(truth))
    total = predicted + annotated
    intersection = int(np.count_nonzero(prediction & truth))
    union = total - intersection
    of_empty = 0.0 if total else 1.0
    return {
        "dice": 2 * intersection / total if total else 1.0,
        "iou": intersection / union if union else 1.0,
        "pixel_accuracy": int(np.count_nonzero(prediction == truth)) / truth.size,
        "precision": intersection / predicted if predicted else of_empty,
        "recall": intersection / annotated if annotated else of_empty,
    }


def check_mask(mask: np.ndarray) -> None:
    """Refuses what is no mask.

    Raises:
        ValueError: It is not boolean, or not 2-D.
    """
    if mask.dtype != np.bool_ or mask.ndim != 2:
        raise ValueError(f"a mask must be 2-D and boolean, not {mask.dtype} {mask.shape}")


def check_masks(
    prediction: Bool[np.ndarray, "height width"], truth: Bool[np.ndarray, "height width"]
) -> None:
    """Refuses masks that can't be compared.

    Args:
        prediction: Predicted mask.
        truth: Annotated mask.

    Raises:
        ValueError: The masks are not boolean, not 2-D, without pixels, or differ in shape.
    """
    if prediction.dtype != np.bool_ or truth.dtype != np.bool_:
        raise ValueError(f"masks must be boolean, not {prediction.dtype} and {truth.dtype}")
    if prediction.shape != truth.shape or prediction.ndim != 2 or prediction.size == 0:
        raise ValueError(
            "masks must have the same (height, width): "
            f"prediction {prediction.shape}, truth {truth.shape}"
        )


def aggregate(per_image: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Returns the number of images `n`, and the distribution of every metric.

    Every image counts the same, whatever its size. `std` is the sample standard deviation
    (divisor n - 1), and 0 for one image; `ci95` is the mean's 95 % bootstrap interval
    (percentiles of 2000 resamplings of the images; Efron & Tibshirani 1993, section 13.3).

    Args:
        per_image: The metrics of each image, such as `segmentation_metrics` returns.

    Returns:
        `{"n": 2, "dice": {"mean": 0.9, "std": 0.1, "median": 0.9, "ci95": [0.8, 1.0]}, ...}`,
        metrics in the first image's order.

    Raises:
        InputError: There are no images.
        ValueError: Two images have different metrics.
    """
    if not per_image:
        raise InputError("there are no images to evaluate: choose a split that has some")
    if any(metrics.keys() != per_image[0].keys() for metrics in per_image):
        raise ValueError("every image must have the same metrics")
    count = len(per_image)
    # The same resamplings for every metric, and in every evaluation of as many images.
    resampled = np.random.default_rng(0).integers(count, size=(RESAMPLINGS, count))
    return {"n": count} | {
        name: _distribution(np.array([metrics[name] for metrics in per_image]), resampled)
        for name in per_image[0]
    }


def _distribution(values: np.ndarray, resampled: np.ndarray) -> dict[str, Any]:
    low, high = np.percentile(values[resampled].mean(1), (2.5, 97.5))
    return {
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        "median": float(np.median(values)),
        "ci95": [float(low), float(high)],
    }
