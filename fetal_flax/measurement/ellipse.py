"""The ellipse that a fetal head is measured by."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, UInt8
from scipy.special import ellipe


@dataclasses.dataclass(frozen=True)
class Ellipse:
    """An ellipse in pixels: x runs right, y runs down, pixel centres lie at integers.

    Attributes:
        center_x: column of the centre.
        center_y: row of the centre.
        semi_major: longer semi-axis.
        semi_minor: shorter semi-axis.
        angle: radians from the x axis to the major axis, towards y (clockwise on the screen),
            within [-pi/2, pi/2].
    """

    center_x: float
    center_y: float
    semi_major: float
    semi_minor: float
    angle: float

    @property
    def circumference(self) -> float:
        """Circumference in pixels, by the complete elliptic integral of the second kind."""
        flattening = 1.0 - (self.semi_minor / self.semi_major) ** 2
        return float(4.0 * self.semi_major * ellipe(flattening))

    def points(
        self, u: Float[np.ndarray, " points"], v: Float[np.ndarray, " points"]
    ) -> Float[np.ndarray, "points 2"]:
        """Maps head coordinates to pixels.

        Args:
            u: positions along the major axis, in semi-major axes.
            v: positions along the minor axis, in semi-minor axes; positive is further down.

        Returns:
            The (x, y) positions in pixels.
        """
        along = self.semi_major * np.asarray(u)
        across = self.semi_minor * np.asarray(v)
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return np.stack(
            [
                self.center_x + along * cos - across * sin,
                self.center_y + along * sin + across * cos,
            ],
            axis=-1,
        )

    def filled(self, height: int, width: int) -> UInt8[np.ndarray, "height width"]:
        """Draws the ellipse.

        Args:
            height: rows of the mask.
            width: columns of the mask.

        Returns:
            255 where the centre of the pixel is inside, 0 elsewhere.
        """
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        half_width = math.hypot(self.semi_major * cos, self.semi_minor * sin)
        half_height = math.hypot(self.semi_major * sin, self.semi_minor * cos)
        columns = _around(self.center_x, half_width, width)
        rows = _around(self.center_y, half_height, height)
        y = np.arange(height)[rows, None] - self.center_y

        def is_inside(column: np.ndarray) -> np.ndarray:
            x = column - self.center_x
            u = (x * cos + y * sin) / self.semi_major
            v = (y * cos - x * sin) / self.semi_minor
            return u * u + v * v <= 1.0

        # A row of an ellipse is one run of pixels, whose ends the conic's equation gives up to
        # rounding: these are tried, instead of all pixels.
        a, b = self.semi_major, self.semi_minor
        middle = self.center_x + y * (a * a - b * b) * sin * cos / half_height**2
        reach = a * b * np.sqrt(np.maximum(half_height**2 - y * y, 0)) / half_height**2
        first, last = np.ceil(middle - reach), np.floor(middle + reach)
        first = np.where(is_inside(first - 1), first - 1, first + ~is_inside(first))
        last = np.where(is_inside(last + 1), last + 1, last - ~is_inside(last))
        first, last = (np.clip(end, -1, width).astype(np.int32) for end in (first, last))
        column = np.arange(width, dtype=np.int32)[columns]
        mask = np.zeros((height, width), np.uint8)
        mask[rows, columns] = ((first <= column) & (column <= last)) * np.uint8(255)
        return mask


def _around(center: float, reach: float, size: int) -> slice:
    """Returns the pixels of an image's side up to `reach` from the centre, and one more."""
    first, last = math.floor(center - reach) - 1, math.ceil(center + reach) + 1
    return slice(min(max(first, 0), size), min(max(last + 1, 0), size))
