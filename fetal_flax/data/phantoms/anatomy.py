"""The anatomy between the skin and the far end of the sector: what lies around the head."""

import math

import cv2
import numpy as np
from jaxtyping import Float

from fetal_flax.data.phantoms.brain import paint_skull_and_brain
from fetal_flax.data.phantoms.canvas import (
    LEVEL_TISSUE,
    LEVELS_FLUID,
    Canvas,
    bent_line,
    blob_outline,
    fading,
    smooth_noise,
)
from fetal_flax.data.phantoms.geometry import Head, Raster, Sector


def paint_anatomy(rng: np.random.Generator, raster: Raster, head: Head) -> Canvas:
    """Paints everything between the skin and the far end of the sector, back to front."""
    canvas = Canvas(raster, LEVEL_TISSUE + rng.normal(-1.0, 4.0))
    _paint_surroundings(rng, canvas, head)
    _paint_interfaces(rng, canvas)
    _paint_fluid(rng, canvas, head)
    _paint_abdominal_wall(rng, canvas, head)
    if rng.random() < 0.35:
        _paint_limb(rng, canvas, head)
    paint_skull_and_brain(rng, canvas, head)
    _add_texture(rng, canvas)
    return canvas


def _paint_surroundings(rng: np.random.Generator, canvas: Canvas, head: Head) -> None:
    """Paints placenta, and bright and dark tissue of mother and fetus around the head."""
    ellipse = head.ellipse
    for _ in range(rng.integers(2, 6)):
        direction = rng.uniform(0.0, 2.0 * math.pi)
        distance = rng.uniform(1.2, 1.9)
        center = (distance * math.cos(direction), distance * math.sin(direction))
        size = (rng.uniform(0.2, 0.7), rng.uniform(0.2, 0.5))
        canvas.region(
            blob_outline(rng, ellipse, center, size, 0.2), LEVEL_TISSUE + rng.normal(0.0, 6.0)
        )
    for side in (-1.0, 1.0):
        # Tissue that bears on the ends of the head is often seen bright, past the edge shadow.
        center = (side * rng.uniform(1.15, 1.5), rng.uniform(-0.1, 0.8))
        size = (rng.uniform(0.1, 0.3), rng.uniform(0.15, 0.4))
        canvas.region(
            blob_outline(rng, ellipse, center, size, 0.2), LEVEL_TISSUE + rng.uniform(0, 12)
        )
    if rng.random() < 0.45:
        side = rng.choice([-1.0, 1.0])
        center = (side * rng.uniform(0.3, 2.2), rng.choice([-1.0, 1.0]) * rng.uniform(1.2, 2.0))
        size = (rng.uniform(0.8, 1.6), rng.uniform(0.6, 1.0))
        canvas.region(
            blob_outline(rng, ellipse, center, size, 0.06), LEVEL_TISSUE + rng.uniform(3.0, 8.0)
        )


def _paint_interfaces(rng: np.random.Generator, canvas: Canvas) -> None:
    """Paints sheets between tissues, anywhere in the sector, mostly square to the beams."""
    sector = canvas.raster.sector
    deepest = canvas.raster.depths * canvas.raster.depth_step
    top = canvas.raster.first_depth - sector.near
    for _ in range(rng.integers(5, 45)):
        span = rng.uniform(0.04, 0.3)
        start = rng.uniform(-1.0, 1.0 - span)
        slope = np.cumsum(rng.normal(rng.normal(0.0, 2.0), 1.0, 9))
        arc = _arc(sector, top + rng.uniform(0.0, deepest) + slope, start, start + span)
        canvas.stroke(arc, fading(8) * rng.uniform(0.01, 0.1), rng.uniform(2.0, 5.0))


def _paint_abdominal_wall(rng: np.random.Generator, canvas: Canvas, head: Head) -> None:
    """Paints skin, fat and muscle: bright sheets along the probe face, and its reverberation."""
    sector, pixel_size = canvas.raster.sector, head.pixel_size_mm
    underside = rng.uniform(6.0, 14.0) + np.cumsum(rng.normal(0.0, 0.5, 17))
    band = np.vstack(
        [_arc(sector, np.zeros(17), -1.1, 1.1), _arc(sector, underside / pixel_size, 1.1, -1.1)]
    )
    canvas.region(band, LEVEL_TISSUE + rng.normal(0.0, 3.0))
    for _ in range(rng.integers(15, 60)):
        span = rng.uniform(0.1, 0.5)
        start = rng.uniform(-1.0, 1.0 - span)
        depth_mm = rng.triangular(0.5, 5.0, 22.0) + np.cumsum(rng.normal(0.0, 0.12, 13))
        arc = _arc(sector, depth_mm / pixel_size, start, start + span)
        canvas.stroke(arc, fading(12) * rng.uniform(0.02, 0.12), 0.3 / pixel_size)
    ring_step = rng.uniform(0.9, 1.8)
    for ring in range(4):
        arc = _arc(sector, np.full(33, (ring + 0.5) * ring_step / pixel_size), -1.0, 1.0)
        amplitude = rng.uniform(0.05, 0.15) / (1.0 + ring)
        canvas.stroke(arc, amplitude * rng.uniform(0.3, 1.0, 32), 0.4 / pixel_size)


def _arc(
    sector: Sector, depth: Float[np.ndarray, " points"], start: float, end: float
) -> Float[np.ndarray, "points 2"]:
    """Returns a line along the probe face: depths below it, between shares of the half angle."""
    angle = sector.tilt + sector.half_angle * np.linspace(start, end, len(depth))
    radius = sector.near + depth
    return np.stack(
        [sector.apex_x + radius * np.sin(angle), sector.apex_y + radius * np.cos(angle)], axis=-1
    )


def _paint_fluid(rng: np.random.Generator, canvas: Canvas, head: Head) -> None:
    """Paints a cavity of amniotic fluid behind the head, with a faintly reflecting wall."""
    if rng.random() > (0.95 if head.early else 0.6):
        return
    ellipse = head.ellipse
    spread = (1.3, 2.3) if head.early else (1.02, 1.45)
    center = (rng.normal(0.0, 0.35), rng.normal(-0.1, 0.25))
    size = (rng.uniform(*spread), rng.uniform(*spread))
    wall = blob_outline(rng, ellipse, center, size, 0.04)
    canvas.region(wall, rng.uniform(*LEVELS_FLUID))
    canvas.stroke(np.vstack([wall, wall[:1]]), rng.uniform(0.01, 0.06), 3.0, specularity=8.0)


def _paint_limb(rng: np.random.Generator, canvas: Canvas, head: Head) -> None:
    """Paints a distractor beside the head: a row of bright bones, as of a spine or a hand."""
    side = rng.choice([-1.0, 1.0])
    u, v = side * rng.uniform(1.1, 1.35), rng.uniform(-0.7, 0.7)
    canvas.region(blob_outline(rng, head.ellipse, (u, v), (0.22, 0.3)), LEVEL_TISSUE)
    slope, step = rng.normal(0.0, 0.5), rng.uniform(0.06, 0.12)
    for bone in range(rng.integers(1, 6)):
        start = (u + side * bone * step, v + slope * bone * step)
        end = (start[0] + 0.6 * step, start[1] + rng.normal(0.0, 0.05))
        points = bent_line(rng, head.ellipse, start, end)
        canvas.stroke(points, fading(8) * rng.uniform(0.2, 0.8), 5.0, 1.0)


def _add_texture(rng: np.random.Generator, canvas: Canvas) -> None:
    """Softens the borders between tissues and makes each tissue uneven."""
    shape = canvas.level.shape
    soft = max(0.8, 2.0 / canvas.raster.depth_step)
    cv2.GaussianBlur(canvas.level, (0, 0), soft, dst=canvas.level)
    # Reflectors are rough: their echo comes and goes along them.
    canvas.specular *= cv2.exp(0.5 * smooth_noise(rng, shape, (90, 140)))
    for cells, size in (((5, 4), 5.0), ((24, 16), 2.0), ((60, 40), 2.5), ((110, 25), 2.0)):
        canvas.level += rng.uniform(0.3, 1.2) * size * smooth_noise(rng, shape, cells)
