"""What anatomy is painted on, the shapes it is painted with, and its echo levels.

Echo levels are in decibels relative to the brightest gray the display can show. Positions are in
reference pixels (see `geometry`), or in semi-axes of the head's ellipse.
"""

import math

import cv2
import numpy as np
from jaxtyping import Float, Float32

from fetal_flax.data.phantoms.geometry import Raster, Sector, unit_circle
from fetal_flax.measurement.ellipse import Ellipse

# Echo levels in dB.
LEVELS_FLUID = (-75.0, -54.0)  # haze of the side lobes
LEVEL_TISSUE = -34.0
LEVEL_BRAIN = -42.0
_BONE_GRAIN_DB = -3.0  # diffuse relative to specular echo of the skull
DB_TO_NEPER = math.log(10.0) / 20.0

_SUBPIXEL_BITS = 4  # fixed-point fraction of the coordinates cv2 draws with


class Canvas:
    """What the beams meet: maps over the raster, painted in order of appearance.

    Attributes:
        level: diffuse echo level in dB, as (depths, beams).
        specular: amplitude of mirror-like echoes, 1 being white, as (depths, beams).
        bone: 1 where sound is absorbed strongly, as (depths, beams).
    """

    def __init__(self, raster: Raster, level: float) -> None:
        """Makes a canvas of one echo level without any bone or reflector."""
        shape = (raster.depths, raster.beams)
        self.raster = raster
        self.level = np.full(shape, level, np.float32)
        self.specular = np.zeros(shape, np.float32)
        self.bone = np.zeros(shape, np.uint8)

    def _fixed_point(self, points: Float[np.ndarray, "points 2"]) -> np.ndarray:
        beam, depth = self.raster.index(points[:, 0], points[:, 1])
        scaled = np.stack([beam, depth], axis=-1) * (1 << _SUBPIXEL_BITS)
        return np.rint(scaled).astype(np.int32)

    def region(self, points: Float[np.ndarray, "points 2"], level: float) -> None:
        """Fills a polygon (reference pixels) with one echo level, hiding what was there."""
        corners = [self._fixed_point(points)]
        cv2.fillPoly(self.level, corners, level, shift=_SUBPIXEL_BITS)
        cv2.fillPoly(self.specular, corners, 0.0, shift=_SUBPIXEL_BITS)

    def stroke(
        self,
        points: Float[np.ndarray, "points 2"],
        amplitude: float | Float[np.ndarray, " segments"],
        thickness: float,
        specularity: float = 2.0,
    ) -> None:
        """Paints a thin reflector, brightest where the beam meets it at a right angle.

        Args:
            points: corners of the line, reference pixels.
            amplitude: echo amplitude of each segment at perpendicular incidence.
            thickness: reference pixels.
            specularity: exponent of the cosine of the angle of incidence.
        """
        strength = amplitude * incidence(self.raster.sector, points) ** specularity
        corners = self._fixed_point(points)
        width = max(1, round(thickness / self.raster.depth_step))
        for start, end, value in zip(corners[:-1], corners[1:], strength, strict=True):
            cv2.line(
                self.specular, start, end, float(value), width, cv2.LINE_8, shift=_SUBPIXEL_BITS
            )

    def shell(
        self,
        outer: Float[np.ndarray, "points 2"],
        inner: Float[np.ndarray, "points 2"],
        amplitude: Float[np.ndarray, " points"],
    ) -> None:
        """Paints bone between two closed contours, one quadrilateral per pair of points."""
        first, second = self._fixed_point(outer), self._fixed_point(inner)
        quads = np.stack([first, np.roll(first, -1, 0), np.roll(second, -1, 0), second], axis=1)
        for quad, value in zip(quads, amplitude, strict=True):
            cv2.fillConvexPoly(self.specular, quad, float(value), shift=_SUBPIXEL_BITS)
            grain = 20.0 * math.log10(value) + _BONE_GRAIN_DB
            cv2.fillConvexPoly(self.level, quad, grain, shift=_SUBPIXEL_BITS)
            cv2.fillConvexPoly(self.bone, quad, 1, shift=_SUBPIXEL_BITS)


def wobble(rng: np.random.Generator, count: int, size: float, harmonics: int) -> np.ndarray:
    """Returns a smooth periodic random curve of `count` values, standard deviation `size`."""
    directions = np.arange(count) * (2.0 * math.pi / count)
    orders = np.arange(2, harmonics + 2)
    weights = rng.normal(0.0, 1.0, (2, harmonics)) * size / math.sqrt(harmonics)
    waves = np.outer(orders, directions)
    return weights[0] @ np.cos(waves) + weights[1] @ np.sin(waves)


def blob_outline(
    rng: np.random.Generator,
    ellipse: Ellipse,
    center: tuple[float, float],
    size: tuple[float, float],
    roughness: float = 0.1,
) -> Float[np.ndarray, "points 2"]:
    """Returns the outline of an irregular blob, placed and sized in semi-axes of the ellipse."""
    count = 48
    cos, sin = unit_circle(count)
    radius = 1.0 + wobble(rng, count, roughness, 5)
    return ellipse.points(center[0] + size[0] * radius * cos, center[1] + size[1] * radius * sin)


def bent_line(
    rng: np.random.Generator,
    ellipse: Ellipse,
    start: tuple[float, float],
    end: tuple[float, float],
    bend: float = 0.02,
) -> Float[np.ndarray, "points 2"]:
    """Returns a slightly bent line between two positions given in semi-axes of the ellipse."""
    steps = np.linspace(0.0, 1.0, 9)
    sag = rng.normal(0.0, bend) * np.sin(math.pi * steps)
    u = start[0] + (end[0] - start[0]) * steps
    v = start[1] + (end[1] - start[1]) * steps + sag
    return ellipse.points(u, v)


def fading(count: int) -> Float[np.ndarray, " segments"]:
    """Returns the strength of the segments of a line that fades out towards both ends."""
    return np.sin(math.pi * (np.arange(count) + 0.5) / count)


def incidence(
    sector: Sector, points: Float[np.ndarray, "points 2"]
) -> Float[np.ndarray, " segments"]:
    """Returns, per segment, the cosine between the beam and the normal of the segment."""
    tangent = np.diff(points, axis=0)
    beam = (points[1:] + points[:-1]) / 2.0 - (sector.apex_x, sector.apex_y)
    cross = tangent[:, 0] * beam[:, 1] - tangent[:, 1] * beam[:, 0]
    lengths = np.hypot(*tangent.T) * np.hypot(*beam.T)
    return np.abs(cross) / np.maximum(lengths, 1e-9)


def smooth_noise(
    rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int]
) -> Float32[np.ndarray, "depths beams"]:
    """Returns smooth noise of about unit deviation; the pattern does not depend on the shape."""
    coarse = rng.standard_normal(cells, dtype=np.float32)
    return cv2.resize(coarse, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
