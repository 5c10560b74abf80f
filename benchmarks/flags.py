"""How many bad images the quality flags catch, and how many others they name.

    python benchmarks/flags.py --data-dir HC18 [--checkpoint NAME ...]

Takes the validation images of a network's own split, in halves by examination as `ablation.py`
does. An image is bad if its ellipse has a Dice below 0.94 or its circumference is off by more than
8 mm. Prints what the thresholds of `measurement/quality.py` flag in either half, and what other
thresholds of ellipse agreement and size spread would; thresholds are chosen by the first half.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ablation import HALVES, half_of
from exported import open_split

import fetal_flax as ff
from fetal_flax.checkpoints import shipped
from fetal_flax.data.datasets import Record
from fetal_flax.measurement import quality
from fetal_flax.measurement.ellipse_overlap import ellipse_metrics

LEAST_DICE = 0.94
LARGEST_ERROR_MM = 8.0
AGREEMENTS = (0.97, 0.975, 0.98, 0.985, 0.99)
SPREADS_MM = (8.0, 10.0, 12.0, 15.0, 20.0)


class Judged(NamedTuple):
    """An image with what flags go by."""

    half: int
    bad: bool
    flags: frozenset[str]
    agreement: float
    spread_mm: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="HC18 folder")
    parser.add_argument(
        "--checkpoint", nargs="+", default=list(shipped.names()), help="networks with a split"
    )
    arguments = parser.parse_args()
    for name in arguments.checkpoint:
        images = judge_all(name, arguments.data_dir)
        first, second = (f"{half}: bad, others" for half in HALVES)
        print(f"\n{name}\n\n| thresholds | {first} | {second} |\n|---|---|---|")
        print(_table_row("as they are", images, lambda image: bool(image.flags)))
        for agreement, spread_mm in itertools.product(AGREEMENTS, SPREADS_MM):
            row = f"agreement {agreement:g}, spread {spread_mm:g} mm"
            thresholds = {"agreement": agreement, "spread_mm": spread_mm}
            print(_table_row(row, images, functools.partial(flagged_by, **thresholds)))


def flagged_by(image: Judged, *, agreement: float, spread_mm: float) -> bool:
    """Returns whether an image would be flagged with other thresholds of the two."""
    others = image.flags - {"uncertain_size", "low_ellipse_agreement"}
    return bool(others) or image.spread_mm > spread_mm or image.agreement < agreement


def judge_all(checkpoint: str, data_dir: Path) -> list[Judged]:
    """Measures the validation images of a network's split."""
    dataset, sides = open_split(checkpoint, data_dir)
    measured = ff.load(checkpoint).measure_each(
        map(dataset.record, sides.validation),
        lambda record: record.image,
        lambda record: record.pixel_size_mm,
    )
    return [judge(record, measurement) for record, measurement in measured]


def judge(record: Record, measurement: ff.Measurement) -> Judged:
    """Compares a measurement with its image's annotation."""
    hc_mm = measurement.hc_mm or 0.0
    overlap = ellipse_metrics(measurement.head, record.mask > 0, record.pixel_size_mm)
    return Judged(
        half_of(record.name),
        overlap["ellipse_dice"] < LEAST_DICE
        or abs(hc_mm - record.head_circumference_mm) > LARGEST_ERROR_MM,
        frozenset(measurement.flags),
        measurement.head.ellipse_agreement if measurement.head else 0.0,
        hc_mm * quality.size_spread(measurement.logits),
    )


def _table_row(name: str, images: Sequence[Judged], flagged: Callable[[Judged], bool]) -> str:
    cells = []
    for half in range(len(HALVES)):
        counts = []
        for bad in (True, False):
            kind = [image for image in images if image.half == half and image.bad == bad]
            counts.append(f"{sum(map(flagged, kind))} of {len(kind)}")
        cells.append(", ".join(counts))
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
