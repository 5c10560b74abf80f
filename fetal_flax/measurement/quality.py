"""Which measurements a person should look at before anyone believes them.

Without a reference, some signs still tell a bad prediction from a good one. docs/measurement.md has
how many images they flag, and how many of the bad ones are among them.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import expit, logit

from fetal_flax.measurement.head import Head

LEAST_ELLIPSE_AGREEMENT = 0.98
LEAST_CONFIDENCE = 0.92
LARGEST_SPREAD_MM = 12.0
"""Of the circumference, between the probabilities 0.1 and 0.9. It and the agreement were chosen on
half of the validation examinations."""
PLAUSIBLE_HC_MM = (30.0, 450.0)
"""Circumferences that a fetal head can have, from nine weeks to beyond the largest at term; others
come of a wrong pixel size, most often."""


class Quality(NamedTuple):
    """How far a measurement can be trusted."""

    confidence: float
    """Dice that the network's own probabilities expect of its mask, in [0, 1]."""
    flags: tuple[str, ...]
    """Of `no_head`, `covers_image`, `implausible_size`, `uncertain_size`, `touches_border`,
    `several_components`, `low_ellipse_agreement` and `low_confidence` those that apply."""


def judge(
    logits: Float[np.ndarray, "height width"],
    head: Head | None,
    *,
    pixel_size_mm: float | None = None,
) -> Quality:
    """Judges a prediction.

    Args:
        logits: At the network's size, before the sigmoid.
        head: What was measured in the mask that they give.
        pixel_size_mm: Side of the image's pixels, if known.
    """
    confidence = expected_dice(logits)
    if head is None:
        # A mask without an edge is no head, but nor is it nothing.
        return Quality(confidence, ("covers_image" if (logits > 0).all() else "no_head",))
    least, most = PLAUSIBLE_HC_MM
    # Without a pixel size it is as plausible, and as certain, as any.
    hc_mm = head.in_mm(pixel_size_mm).circumference if pixel_size_mm else None
    signs = {
        "implausible_size": hc_mm is not None and not least <= hc_mm <= most,
        "uncertain_size": hc_mm is not None and hc_mm * size_spread(logits) > LARGEST_SPREAD_MM,
        "touches_border": head.touches_border,
        "several_components": head.components > 1,
        "low_ellipse_agreement": head.ellipse_agreement < LEAST_ELLIPSE_AGREEMENT,
        "low_confidence": confidence < LEAST_CONFIDENCE,
    }
    return Quality(confidence, tuple(name for name, applies in signs.items() if applies))


def size_spread(logits: Float[np.ndarray, "height width"]) -> float:
    """Returns how far the circumference depends on where the head is taken to end.

    The difference between the circumferences at the probabilities 0.1 and 0.9, as a share of that
    at 0.5: a circumference goes with the square root of the area, whatever the shape of the pixels.
    0 for an edge without transition, or without a head.
    """
    areas = [np.count_nonzero(logits > logit(p)) for p in (0.1, 0.5, 0.9)]
    outer, edge, inner = np.sqrt(areas)
    return float((outer - inner) / edge) if edge else 0.0


def expected_dice(logits: Float[np.ndarray, "height width"]) -> float:
    """Returns the Dice of the thresholded mask with the probabilities in the truth's place.

    2·Σ p·m / (Σ p + Σ m), with the probabilities p and the mask m of those above 0.5. 1 where
    every pixel is decided, 0 where no pixel is foreground.
    """
    probabilities = expit(np.asarray(logits, np.float64))
    mask = logits > 0
    return float(2 * probabilities[mask].sum() / (probabilities.sum() + mask.sum()))
