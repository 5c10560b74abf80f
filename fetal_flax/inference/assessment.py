"""What a network's logits say of an image: its mask, its head, and how far to trust them."""

import dataclasses

import cv2
import numpy as np
from jaxtyping import Bool, Float32
from scipy.special import log_expit

from fetal_flax.measurement.gestational_age import GestationalAge, gestational_age
from fetal_flax.measurement.head import Head, HeadSize, measure_head
from fetal_flax.measurement.quality import Quality, judge

NetworkLogits = Float32[np.ndarray, "network_height network_width"]
Views = Float32[np.ndarray, "views network_height network_width"]
"""An image's logits, one map for each way that the network saw it; mirror images mirrored back."""


@dataclasses.dataclass(frozen=True, eq=False)
class Measurement:
    """What is seen in an image, in pixels of its own size; in millimetres where these are known.

    Example:
        >>> result = ff.load("hc18-described").measure(image, pixel_size_mm=0.5)
        >>> result.mask.shape == image.shape, result.flags
        (True, ())
        >>> f"HC {result.hc_mm:.0f} mm, BPD {result.bpd_mm:.0f} mm, OFD {result.ofd_mm:.0f} mm"
        'HC 178 mm, BPD 48 mm, OFD 64 mm'
        >>> f"{result.ga_weeks:.1f} weeks"
        '20.3 weeks'
        >>> f"{result.head.ellipse.semi_major:.0f} pixels"
        '64 pixels'
    """

    mask: Bool[np.ndarray, "height width"]
    """True where the probability of the head is above 0.5."""
    head: Head | None
    """In pixels; None where no head was found."""
    quality: Quality
    """Confidence, in [0, 1], and flags."""
    logits: NetworkLogits
    """At the network's size, before the sigmoid."""
    pixel_size_mm: float | None = None
    """Side of a (square) pixel; None where nothing told it."""
    views: tuple["Measurement", ...] = ()
    """Of the image and of its mirror image, each by itself; empty without `flip`."""

    @property
    def flags(self) -> tuple[str, ...]:
        """Why a person should look: of `no_head`, `touches_border` and others what applies."""
        return self.quality.flags

    @property
    def size(self) -> HeadSize | None:
        """The head's measures in mm; None without a head or a pixel size."""
        if self.head is None or self.pixel_size_mm is None:
            return None
        return self.head.in_mm(self.pixel_size_mm)

    @property
    def hc_mm(self) -> float | None:
        """Head circumference in mm; None without a head or a pixel size."""
        return self.size and self.size.circumference

    @property
    def bpd_mm(self) -> float | None:
        """Biparietal diameter in mm, outer to outer; None without a head or a pixel size."""
        return self.size and self.size.biparietal_diameter

    @property
    def ofd_mm(self) -> float | None:
        """Occipitofrontal diameter in mm; None without a head or a pixel size."""
        return self.size and self.size.occipitofrontal_diameter

    @property
    def gestational_age(self) -> GestationalAge | None:
        """Gestational age and its range in weeks; None too where Hadlock's table has none."""
        return gestational_age(self.size.circumference) if self.size else None

    @property
    def ga_weeks(self) -> float | None:
        """Gestational age in weeks (Hadlock 1984); None where `gestational_age` is."""
        return self.gestational_age and self.gestational_age.weeks


def assess(
    logits: NetworkLogits,
    shape: tuple[int, int],
    *,
    outline_px: float,
    pixel_size_mm: float | None = None,
    views: tuple[Measurement, ...] = (),
) -> Measurement:
    """Assesses an image.

    Args:
        logits: What the network says of it, at the network's size.
        shape: Height and width of the image itself.
        outline_px: How far a mask's edge runs outside the measured ellipse, in pixels of the
            image: `OUTLINE_PX` of the data set that the network was trained with.
        pixel_size_mm: Side of the image's pixels, if known.
        views: What the single views say, if there are several.
    """
    mask = native_mask(logits, shape)
    head = measure_head(mask, outline_px=outline_px)
    quality = judge(logits, head, pixel_size_mm=pixel_size_mm)
    return Measurement(mask, head, quality, logits, pixel_size_mm, views)


def mean_logits(views: Views) -> NetworkLogits:
    """Returns the logits of the views' mean probability.

    Without a detour through probabilities, which round to 0 or 1 where the network is sure.
    """
    if len(views) == 1:
        return views[0]
    # The divisor of both means cancels.
    return np.logaddexp.reduce(log_expit(views)) - np.logaddexp.reduce(log_expit(-views))


def native_mask(logits: NetworkLogits, shape: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """Returns the mask at `shape`, height and width, that logits at the network's size give.

    The head is where the probability is above 0.5. The logits are resized, bilinearly, and then
    thresholded: a mask resized after the threshold would have steps as large as the network's
    pixels.
    """
    height, width = shape
    return cv2.resize(logits, (width, height), interpolation=cv2.INTER_LINEAR) > 0
