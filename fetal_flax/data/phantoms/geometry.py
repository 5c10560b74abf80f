"""The head, the convex probe that looks at it, and the polar raster that its beams lay.

All of it is in *reference pixels*, those of an 800x540 image, whatever the size asked for: x runs
right, y runs down and pixel centres lie at integers. Only the number of raster samples depends on
the size.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from fetal_flax.measurement.ellipse import Ellipse

REFERENCE_HEIGHT = 540
REFERENCE_WIDTH = 800

# Ranges of HC18, 800x540 (a factor 800 / width coarser on smaller images).
PIXEL_SIZE_RANGE_MM = (0.05, 0.33)
HEAD_CIRCUMFERENCE_RANGE_MM = (60.0, 350.0)
CEPHALIC_INDEX_RANGE = (0.72, 0.86)  # biparietal / occipitofrontal diameter
# Below this circumference (about 14 weeks) the choroid plexus fills the head.
EARLY_CIRCUMFERENCE_MM = 110.0
BEAM_SPACING_PX = 1.5  # distance between beams at the depth of the head

# Share of phantoms, lower and upper head circumference in mm: the make-up of HC18.
_AGE_GROUPS = (
    (0.18, 60.0, EARLY_CIRCUMFERENCE_MM),
    (0.10, EARLY_CIRCUMFERENCE_MM, 160.0),
    (0.50, 160.0, 205.0),
    (0.22, 205.0, 350.0),
)
_CUT_PROBABILITY = 0.03  # heads that leave the image or the sector
_HEAD_MARGIN_PX = 8.0


@dataclasses.dataclass(frozen=True)
class Head:
    """The head in reference pixels; `cut` heads may leave the image or the sector."""

    ellipse: Ellipse
    pixel_size_mm: float
    circumference_mm: float
    cut: bool

    @property
    def early(self) -> bool:
        """Whether the head is of the first trimester."""
        return self.circumference_mm < EARLY_CIRCUMFERENCE_MM


@dataclasses.dataclass(frozen=True)
class Sector:
    """Field of view of a convex probe, in reference pixels and radians.

    All beams meet in the apex, behind the face of the probe. `tilt` turns the middle beam away
    from straight down.
    """

    apex_x: float
    apex_y: float
    tilt: float
    half_angle: float
    near: float
    far: float

    def polar(
        self, x: Float[np.ndarray, "*#shape"], y: Float[np.ndarray, "*#shape"]
    ) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
        """Returns distance from the apex and angle from the middle beam of positions."""
        dx, dy = x - self.apex_x, y - self.apex_y
        cos, sin = math.cos(self.tilt), math.sin(self.tilt)
        lateral, axial = dx * cos - dy * sin, dx * sin + dy * cos
        return np.hypot(lateral, axial), np.arctan2(lateral, axial)


@dataclasses.dataclass(frozen=True)
class Raster:
    """Polar raster, depth samples by beams, over the part of the sector the image shows."""

    sector: Sector
    first_depth: float
    depth_step: float
    beam_step: float
    depths: int
    beams: int

    def index(
        self, x: Float[np.ndarray, "*#shape"], y: Float[np.ndarray, "*#shape"]
    ) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
        """Returns the fractional beam and depth indices of positions in reference pixels."""
        radius, angle = self.sector.polar(x, y)
        beam = (angle + self.sector.half_angle) / self.beam_step
        return beam, (radius - self.first_depth) / self.depth_step


def draw_head(rng: np.random.Generator) -> Head:
    """Draws size, place and pixel size of the head, consistent with each other."""
    shares = [group[0] for group in _AGE_GROUPS]
    _, lowest, highest = _AGE_GROUPS[rng.choice(len(_AGE_GROUPS), p=shares)]
    circumference_mm = rng.uniform(lowest, highest)
    cut = bool(rng.random() < _CUT_PROBABILITY)

    early = circumference_mm < EARLY_CIRCUMFERENCE_MM
    on_screen_px = rng.triangular(600, 1000, 1350) if early else rng.triangular(850, 1400, 1680)
    finest, coarsest = PIXEL_SIZE_RANGE_MM
    on_screen_px = np.clip(on_screen_px, circumference_mm / coarsest, circumference_mm / finest)

    cephalic_index = np.clip(rng.normal(0.79, 0.035), *CEPHALIC_INDEX_RANGE)
    turned = rng.random() < (0.5 if early else 0.12)
    angle = rng.uniform(-1.4, 1.4) if turned else rng.normal(0.02, 0.09)
    unit = Ellipse(0.0, 0.0, 1.0, cephalic_index, angle)
    semi_major = on_screen_px / unit.circumference
    reach_x = math.hypot(math.cos(angle), cephalic_index * math.sin(angle))
    reach_y = math.hypot(math.sin(angle), cephalic_index * math.cos(angle))
    semi_major = min(semi_major, (REFERENCE_HEIGHT / 2 - _HEAD_MARGIN_PX) / reach_y)

    center_x = REFERENCE_WIDTH * rng.normal(0.495, 0.04)
    center_y = REFERENCE_HEIGHT * rng.normal(0.505, 0.05)
    room_x, room_y = (semi_major * reach + _HEAD_MARGIN_PX for reach in (reach_x, reach_y))
    center_x = np.clip(center_x, room_x, REFERENCE_WIDTH - room_x)
    center_y = np.clip(center_y, room_y, REFERENCE_HEIGHT - room_y)
    if cut:
        overlap = rng.uniform(0.1, 0.35) * room_x
        center_x = rng.choice([room_x - overlap, REFERENCE_WIDTH - room_x + overlap])

    ellipse = Ellipse(
        float(center_x),
        float(center_y),
        float(semi_major),
        float(semi_major * cephalic_index),
        angle,
    )
    return Head(ellipse, circumference_mm / ellipse.circumference, circumference_mm, cut)


def draw_sector(rng: np.random.Generator, head: Head) -> Sector:
    """Draws a probe of natural size, at a natural depth above the head, that sees all of it."""
    outline = head.ellipse.points(*unit_circle(64))
    near = rng.uniform(40.0, 62.0) / head.pixel_size_mm
    skin_depth = rng.uniform(12.0, 42.0) / head.pixel_size_mm
    face_y = min(outline[:, 1].min() - skin_depth, 60.0)
    tilt = rng.normal(0.0, 0.15 if rng.random() < 0.1 else 0.03)

    # The probe turns about the middle of the image.
    distance = REFERENCE_HEIGHT / 2 - face_y + near
    sector = Sector(
        apex_x=REFERENCE_WIDTH / 2 + rng.normal(0.0, 15.0) - distance * math.sin(tilt),
        apex_y=REFERENCE_HEIGHT / 2 - distance * math.cos(tilt),
        tilt=tilt,
        half_angle=math.radians(rng.uniform(16.0, 36.0)),
        near=near,
        far=near - face_y + rng.uniform(470.0, 760.0),
    )
    radius, angle = sector.polar(outline[:, 0], outline[:, 1])
    widest = np.abs(angle).max() * (0.85 if head.cut else rng.uniform(1.03, 1.2))
    return dataclasses.replace(
        sector,
        half_angle=float(max(sector.half_angle, widest)),
        far=float(max(sector.far, 1.03 * radius.max())),
    )


def lay_raster(sector: Sector, head: Head, scale: float) -> Raster:
    """Lays about one depth sample per output pixel over the visible part of the sector."""
    corners_x = np.array([0.0, 0.0, REFERENCE_WIDTH, REFERENCE_WIDTH])
    corners_y = np.array([0.0, REFERENCE_HEIGHT, 0.0, REFERENCE_HEIGHT])
    farthest = min(sector.far, sector.polar(corners_x, corners_y)[0].max())
    top_x = np.linspace(0.0, REFERENCE_WIDTH, 33)
    nearest = max(sector.near, sector.polar(top_x, np.zeros_like(top_x))[0].min() - 2.0)
    head_depth = math.hypot(
        head.ellipse.center_x - sector.apex_x, head.ellipse.center_y - sector.apex_y
    )
    depth_step = 1.0 / scale
    beam_step = BEAM_SPACING_PX / (scale * head_depth)
    return Raster(
        sector=sector,
        first_depth=nearest,
        depth_step=depth_step,
        beam_step=beam_step,
        depths=math.ceil((farthest - nearest) / depth_step),
        beams=math.ceil(2.0 * sector.half_angle / beam_step),
    )


def to_image(ellipse: Ellipse, height: int, width: int, scale: float) -> Ellipse:
    """Converts an ellipse from reference pixels to pixels of the image."""
    return Ellipse(
        center_x=width / 2 + (ellipse.center_x + 0.5 - REFERENCE_WIDTH / 2) * scale - 0.5,
        center_y=height / 2 + (ellipse.center_y + 0.5 - REFERENCE_HEIGHT / 2) * scale - 0.5,
        semi_major=ellipse.semi_major * scale,
        semi_minor=ellipse.semi_minor * scale,
        angle=ellipse.angle,
    )


def unit_circle(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cosines and sines of `count` directions around the circle."""
    directions = np.arange(count) * (2.0 * math.pi / count)
    return np.cos(directions), np.sin(directions)
