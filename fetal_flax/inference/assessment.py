"""What a network's logits say of an image: its mask, its head, and how far to trust them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from fetal_flax.inference.segmenter import NetworkLogits, native_mask
from fetal_flax.measurement.head import Head, measure_head
from fetal_flax.measurement.quality import Quality, judge


class Assessment(NamedTuple):
    """What is seen in an image, in pixels of the image's own size."""

    mask: Bool[np.ndarray, "height width"]
    head: Head | None
    """None where none was found."""
    quality: Quality


def assess(logits: NetworkLogits, shape: tuple[int, int], *, outline_px: float) -> Assessment:
    """Assesses an image.

    Args:
        logits: What the network says of it, at the network's size.
        shape: Height and width of the image itself.
        outline_px: How far a mask's edge runs outside the measured ellipse, in pixels of the
            image: `OUTLINE_PX` of the data set that the network was trained with.
    """
    mask = native_mask(logits, shape)
    head = measure_head(mask, outline_px=outline_px)
    return Assessment(mask, head, judge(logits, head))
