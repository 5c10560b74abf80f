"""An exported file beside the network that it was made of: both segment the same images."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import rich.table
from jaxtyping import Float32, UInt8

from fetal_flax._util import console
from fetal_flax.checkpoints import Checkpoint
from fetal_flax.data.images import resize_image
from fetal_flax.inference.assessment import assess
from fetal_flax.inference.segmenter import Segmenter
from fetal_flax.inference.sources import Image
from fetal_flax.measurement.head import OUTLINE_PX
from fetal_flax.measurement.overlap import segmentation_metrics

Runtime = Callable[[UInt8[np.ndarray, "batch height width"]], Float32[np.ndarray, "..."]]
"""Runs a file: from grey images at the network's size to logits, (batch, height, width)."""
LARGEST_BATCH = 4


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far a file is from its network, over images."""

    images: int
    largest_logit: float
    """Of the network, without its sign."""
    logit_difference: float
    """The largest."""
    pixels: int
    """At the network's size, of all images."""
    differing_pixels: int
    """In the head by one and not by the other."""
    dice: tuple[float, float]
    """Mean and lowest Dice of the two masks at the images' own size."""
    circumference_change: tuple[float, float]
    """Mean and largest change of the circumference, as a share of it; over images in which both
    see a head, and NaN without any."""
    heads_of_one: int
    """Images in which only one of the two sees a head."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How far a file may be from its network."""

    logit_difference: float
    """As a share of the largest logit."""
    dice: float
    """Mean."""
    circumference_change: float
    """Mean, as a share."""

    def problems(self, comparison: Comparison) -> list[str]:
        """Returns what is beyond its limit, and by how much; NaN is beyond any."""
        logits = comparison.logit_difference / max(comparison.largest_logit, 1e-30)
        dice, change = comparison.dice[0], comparison.circumference_change[0]
        found = []
        if not logits <= self.logit_difference:
            found.append(
                f"logits differ by {logits:.2g} of the largest (limit {self.logit_difference:g})"
            )
        if not dice >= self.dice:
            found.append(f"the masks' mean Dice is {dice:.4f} (limit {self.dice:g})")
        if change > self.circumference_change:
            found.append(
                f"circumferences change by {100 * change:.2f} % in the mean "
                f"(limit {100 * self.circumference_change:g} %)"
            )
        return found


def compare(
    checkpoint: Checkpoint, run: Runtime, images: Sequence[Image], size: tuple[int, int]
) -> Comparison:
    """Segments images by a file and by the network, and compares.

    The first image is a batch of its own, the others come in larger batches.

    Args:
        checkpoint: The network.
        run: Runs the file.
        images: Grey, uint8, of any sizes; at least one.
        size: Height and width at which both see them.
    """
    metadata = dataclasses.replace(checkpoint.metadata, image_size=size)
    ours = Segmenter(checkpoint._replace(metadata=metadata), batch_size=LARGEST_BATCH)
    outline_px = OUTLINE_PX[metadata.dataset]
    largest = difference = 0.0
    differing, of_one = 0, 0
    dice: list[float] = []
    changes: list[float] = []
    for image, expected, found in zip(
        images, ours.logits(images), _logits(run, images, size), strict=True
    ):
        largest = max(largest, float(np.abs(expected).max()))
        # Written so that NaN stays.
        difference = float(np.maximum(difference, np.abs(found - expected).max()))
        differing += int(np.count_nonzero((found > 0) != (expected > 0)))
        before, after = (
            assess(logits, image.shape, outline_px=outline_px) for logits in (expected, found)
        )
        dice.append(segmentation_metrics(after.mask, before.mask)["dice"])
        if before.head and after.head:
            circumference = before.head.ellipse.circumference
            changes.append(abs(after.head.ellipse.circumference / circumference - 1))
        elif before.head or after.head:
            of_one += 1
    return Comparison(
        images=len(images),
        largest_logit=largest,
        logit_difference=difference,
        pixels=len(images) * size[0] * size[1],
        differing_pixels=differing,
        dice=(float(np.mean(dice)), min(dice)),
        circumference_change=(float(np.mean(changes)), max(changes))
        if changes
        else (np.nan, np.nan),
        heads_of_one=of_one,
    )


def table(comparison: Comparison, title: str) -> rich.table.Table:
    """Returns the comparison as a table for the terminal."""
    made = console.table(["", ""], title=title)
    mean, largest = (f"{100 * change:.3f} %" for change in comparison.circumference_change)
    share = comparison.differing_pixels / comparison.pixels
    for row in (
        ("largest logit", f"{comparison.largest_logit:.3f}"),
        ("largest difference of a logit", f"{comparison.logit_difference:.2g}"),
        ("pixels that differ", f"{comparison.differing_pixels} ({100 * share:.4f} %)"),
        ("Dice of the masks: mean, lowest", "{:.5f}, {:.5f}".format(*comparison.dice)),
        ("change of the circumference: mean, largest", f"{mean}, {largest}"),
        ("heads that only one of them sees", str(comparison.heads_of_one)),
    ):
        made.add_row(*row)
    return made


def _logits(
    run: Runtime, images: Sequence[Image], size: tuple[int, int]
) -> Iterator[Float32[np.ndarray, "height width"]]:
    resized = [resize_image(image, size) for image in images]
    yield from run(np.stack(resized[:1]))
    for start in range(1, len(resized), LARGEST_BATCH):
        yield from run(np.stack(resized[start : start + LARGEST_BATCH]))
