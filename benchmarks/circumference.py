"""Head circumference from ground-truth masks, by several fits, against the known one.

    python benchmarks/circumference.py --hc18 ../shared/hc18 --phantoms 500

Prints the tables of docs/measurement.md: DF is the signed difference, ADF the absolute one. Below
each stands how well the masks match the ellipses of their own edges.
"""

import argparse
import concurrent.futures
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import skimage.measure

from fetal_flax.data import hc18
from fetal_flax.data.phantoms import make_phantom
from fetal_flax.measurement.ellipse import Ellipse
from fetal_flax.measurement.ellipse_overlap import ellipse_metrics
from fetal_flax.measurement.head import (
    OUTLINE_PX,
    edge_points,
    fit_ellipse,
    largest_region,
    measure_head,
)

Fit = Callable[[np.ndarray], tuple[float, float]]


def axes_of(ellipse: Ellipse | None) -> tuple[float, float]:
    assert ellipse is not None
    return ellipse.semi_major, ellipse.semi_minor


def by_opencv(fit: Callable, points: Callable[[np.ndarray], np.ndarray], mask: np.ndarray):
    _, diameters, _ = fit(points(mask).astype(np.float32))
    return max(diameters) / 2, min(diameters) / 2


def by_scikit_image(mask: np.ndarray) -> tuple[float, float]:
    """scikit-image's EllipseModel: the direct fit of Halir & Flusser (1998)."""
    ellipse = skimage.measure.EllipseModel.from_estimate(inner_points(mask))
    return max(ellipse.axis_lengths), min(ellipse.axis_lengths)


def inner_points(mask: np.ndarray) -> np.ndarray:
    """Edge points, the image's border left out."""
    return edge_points(mask)[0]


def all_points(mask: np.ndarray) -> np.ndarray:
    """Edge points, with those where the border cuts the head off."""
    return edge_points(np.pad(mask, 1))[0] - 1


def pixel_centres(mask: np.ndarray) -> np.ndarray:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return max(contours, key=len)[:, 0]


def by_moments(mask: np.ndarray) -> tuple[float, float]:
    """Axes of the ellipse with the region's second moments."""
    rows, columns = np.nonzero(mask)
    moments = np.cov(np.stack([columns, rows]), bias=True) + np.eye(2) / 12
    small, large = np.linalg.eigvalsh(moments)
    return 2 * math.sqrt(large), 2 * math.sqrt(small)


FITS: dict[str, Fit] = {
    "edges, least squares (ours)": lambda mask: axes_of(fit_ellipse(inner_points(mask))),
    "edges, border included": functools.partial(by_opencv, cv2.fitEllipse, all_points),
    "edges, approximate mean square": functools.partial(by_opencv, cv2.fitEllipseAMS, inner_points),
    "edges, direct": functools.partial(by_opencv, cv2.fitEllipseDirect, inner_points),
    "edges, scikit-image's EllipseModel": by_scikit_image,
    "pixel centres, least squares": functools.partial(by_opencv, cv2.fitEllipse, pixel_centres),
    "second moments": by_moments,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hc18", type=Path, required=True)
    parser.add_argument("--phantoms", type=int, default=500)
    options = parser.parse_args()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        records = hc18.find_records(options.hc18)
        print_table(f"HC18, {len(records)} masks", "hc18", list(pool.map(of_record, records)))
    phantoms = [of_phantom(index) for index in range(options.phantoms)]
    print_table(f"{options.phantoms} phantoms", "fetal_phantom", phantoms)


class Measured(NamedTuple):
    axes: dict[str, tuple[float, float]]
    pixel_size: float
    circumference: float
    own: dict[str, float]


def of_record(record: hc18.HC18Record) -> Measured:
    _, mask = hc18.load(record)
    return measured(mask > 0, record.pixel_size_mm, record.head_circumference_mm)


def of_phantom(index: int) -> Measured:
    phantom = make_phantom(0, index)
    return measured(phantom.mask > 0, phantom.pixel_size_mm, phantom.head_circumference_mm)


def measured(mask: np.ndarray, pixel_size: float, circumference: float) -> Measured:
    region, _ = largest_region(mask)
    axes = {name: fit(region) for name, fit in FITS.items()}
    head = measure_head(mask, outline_px=0.0)
    return Measured(axes, pixel_size, circumference, ellipse_metrics(head, mask, pixel_size))


def print_table(title: str, dataset: str, masks: list[Measured]) -> None:
    print(f"\n{title}\n\n| fit | outline, px | DF, mm | ADF, mm | largest, mm |")
    print("|---|---|---|---|---|")
    for name in FITS:
        for outline in sorted({0.0, OUTLINE_PX[dataset]}):
            errors = []
            for mask in masks:
                major, minor = (axis - outline for axis in mask.axes[name])
                ours = Ellipse(0, 0, major, minor, 0).circumference * mask.pixel_size
                errors.append(ours - mask.circumference)
            df, adf = np.array(errors), np.abs(errors)
            print(
                f"| {name} | {outline} | {df.mean():+.3f} ± {df.std(ddof=1):.3f} "
                f"| {adf.mean():.3f} | {adf.max():.2f} |"
            )
    dice, hausdorff = (
        np.array([mask.own[name] for mask in masks])
        for name in ("ellipse_dice", "ellipse_hausdorff_mm")
    )
    print(
        f"\nOwn ellipse: Dice {100 * dice.mean():.2f} % (lowest {100 * dice.min():.2f}), "
        f"Hausdorff {hausdorff.mean():.2f} mm (largest {hausdorff.max():.2f})"
    )


if __name__ == "__main__":
    main()
