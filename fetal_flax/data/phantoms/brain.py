"""The head: skull, scalp and brain, of the first trimester or later.

Positions are in semi-axes of the head's ellipse.
"""

import math

import numpy as np
from jaxtyping import Float

from fetal_flax.data.phantoms.canvas import (
    DB_TO_NEPER,
    LEVEL_BRAIN,
    LEVEL_TISSUE,
    Canvas,
    bent_line,
    blob_outline,
    fading,
    incidence,
    wobble,
)
from fetal_flax.data.phantoms.geometry import Head, unit_circle
from fetal_flax.measurement.ellipse import Ellipse

# Depth below either face of the skull, as a share of its thickness, and the echo from there on.
_SKULL_LAYERS = ((0.04, 0.12), (0.14, 0.3), (0.26, 0.6), (0.38, 1.0))


def paint_skull_and_brain(rng: np.random.Generator, canvas: Canvas, head: Head) -> None:
    """Paints the head over what lies behind it."""
    count = 240
    cos, sin = unit_circle(count)
    # Real skulls are not quite ellipses: the ground truth is the ellipse that fits them.
    shape = 1.0 + wobble(rng, count, 0.006, 3)
    thickness = rng.uniform(0.08, 0.12) if head.early else rng.uniform(0.055, 0.095)
    thickness = thickness * (1.0 + wobble(rng, count, 0.18, 8))

    def contour(depth: float) -> np.ndarray:
        """Returns the skull at a share of its thickness below its outer edge."""
        radius = shape - depth * thickness
        return head.ellipse.points(radius * cos, radius * sin)

    outline = contour(0.0)
    scalp = 1.0 + rng.uniform(0.02, 0.09) * (1.0 + wobble(rng, count, 0.3, 4))
    canvas.region(
        head.ellipse.points(scalp * cos, scalp * sin), LEVEL_TISSUE - rng.uniform(0.0, 16.0)
    )
    canvas.region(outline, LEVEL_BRAIN)
    if head.early:
        _paint_early_brain(rng, canvas, head.ellipse)
    else:
        _paint_brain(rng, canvas, head.ellipse)

    facing = incidence(canvas.raster.sector, np.vstack([outline, outline[:1]]))
    floor = rng.uniform(0.02, 0.08)
    amplitude = rng.uniform(0.6, 1.8) * (floor + (1.0 - floor) * facing ** rng.uniform(2.5, 7.0))
    amplitude = amplitude * np.exp(wobble(rng, count, 0.65, 14)) * _dropouts(rng, count)
    for depth, strength in _SKULL_LAYERS:
        canvas.shell(contour(depth), contour(1.0 - depth), strength * amplitude)


def _dropouts(rng: np.random.Generator, count: int) -> Float[np.ndarray, " points"]:
    """Returns the echo of the skull around the head, weak at sutures and where sound is lost."""
    directions = np.arange(count) * (2.0 * math.pi / count)
    loss_db = np.zeros(count)
    ends = rng.choice([0.0, math.pi], 3) + rng.normal(0.0, 0.5, 3)
    sutures = rng.uniform(0.0, 2.0 * math.pi, rng.integers(0, 4))
    widths = np.concatenate([rng.uniform(0.1, 0.5, len(ends)), np.full(len(sutures), 0.035)])
    for center, width in zip(np.concatenate([ends, sutures]), widths, strict=True):
        away = np.angle(np.exp(1j * (directions - center)))
        loss_db += rng.uniform(0.0, 25.0) * np.exp(-0.5 * (away / width) ** 2)
    return np.exp(-DB_TO_NEPER * loss_db)


def _paint_early_brain(rng: np.random.Generator, canvas: Canvas, ellipse: Ellipse) -> None:
    """Paints a head of the first trimester: two large choroid plexuses beside the midline."""
    bright = LEVEL_BRAIN + rng.uniform(8.0, 14.0)
    for side in (-1.0, 1.0):
        center = (rng.uniform(-0.3, 0.0), side * rng.uniform(0.38, 0.45))
        size = (rng.uniform(0.45, 0.65), rng.uniform(0.28, 0.38))
        canvas.region(blob_outline(rng, ellipse, center, size, 0.18), bright)
    for _ in range(rng.integers(4, 10)):
        direction = rng.uniform(0.0, 2.0 * math.pi)
        center = (0.65 * math.cos(direction), 0.65 * math.sin(direction))
        size = (rng.uniform(0.06, 0.2), rng.uniform(0.06, 0.14))
        canvas.region(
            blob_outline(rng, ellipse, center, size, 0.2), LEVEL_BRAIN - rng.uniform(4.0, 20.0)
        )
    _paint_midline(rng, canvas, ellipse, gap=(0.3, rng.normal(0.0, 0.03)))


def _paint_brain(rng: np.random.Generator, canvas: Canvas, ellipse: Ellipse) -> None:
    """Paints the plane of the biparietal diameter: midline, thalami, cavum and ventricles.

    Positions are in semi-axes: u towards the forehead, v away from the probe.
    """
    forehead = rng.choice([-1.0, 1.0])
    middle = rng.normal(0.0, 0.03)

    def blob(u: float, v: float, size: tuple[float, float], level: float) -> None:
        du, dv = rng.normal(0.0, 0.03, 2)
        outline = blob_outline(rng, ellipse, (forehead * (u + du), middle + v + dv), size)
        canvas.region(outline, LEVEL_BRAIN + level * rng.uniform(0.3, 1.2))

    def line(u: tuple[float, float], v: tuple[float, float], amplitude: float) -> None:
        du = rng.normal(0.0, 0.03, 2)
        start = (forehead * (u[0] + du[0]), middle + v[0] + rng.normal(0.0, 0.015))
        end = (forehead * (u[1] + du[1]), middle + v[1] + rng.normal(0.0, 0.015))
        strength = amplitude * math.exp(rng.normal(-0.5, 0.8))
        canvas.stroke(
            bent_line(rng, ellipse, start, end), strength * fading(8), rng.uniform(2.0, 5.0), 4.0
        )

    contrast = rng.uniform(0.5, 1.1)  # how well this plane shows the landmarks
    # Reverberation of the near skull veils the upper half of the brain.
    canvas.region(
        blob_outline(rng, ellipse, (0.0, -0.5), (0.75, 0.38)), LEVEL_BRAIN + rng.uniform(0, 5)
    )
    blob(-0.05, 0.3, (0.45, 0.3), 4.0 * contrast)
    for _ in range(rng.integers(5, 25)):
        u, v = rng.uniform(-0.75, 0.75), rng.triangular(-0.6, 0.3, 0.8)
        blob(u, v, (rng.uniform(0.03, 0.14), rng.uniform(0.02, 0.08)), rng.normal(0.0, 7.0))
    for side in (-1.0, 1.0):
        blob(-0.02, 0.19 * side, (0.17, 0.14), -3.0 * contrast)
    blob(-0.42, 0.4, (0.26, 0.2), -12.0 * contrast)
    blob(0.5, 0.3, (0.2, 0.12), -8.0 * contrast)
    blob(-0.38, 0.45, (0.15, 0.13), 13.0 * contrast)
    blob(0.05, 0.78, (0.55, 0.08), -12.0 * contrast)
    if rng.random() < 0.4:
        blob(-0.35, -0.42, (0.14, 0.1), 8.0 * contrast)

    _paint_midline(rng, canvas, ellipse, gap=(forehead * 0.38, middle))
    blob(0.38, 0.0, (0.12, 0.055), -14.0)
    for side in (-1.0, 1.0):
        line((0.25, 0.5), (0.075 * side, 0.075 * side), 0.45 * contrast)
        line((0.55, 0.72), (0.16 * side, 0.24 * side), 0.2 * contrast)
    line((-0.6, -0.25), (0.2, 0.2), 0.25 * contrast)
    line((-0.55, -0.2), (0.58, 0.62), 0.15 * contrast)
    line((-0.1, 0.3), (0.62, 0.55), 0.15 * contrast)
    for _ in range(rng.integers(4, 22)):
        u, v = rng.uniform(-0.7, 0.7), rng.triangular(-0.6, 0.25, 0.75)
        line(
            (u, u + rng.uniform(0.03, 0.15)),
            (v, v + rng.normal(0.0, 0.03)),
            rng.uniform(0.02, 0.2) * contrast,
        )


def _paint_midline(
    rng: np.random.Generator, canvas: Canvas, ellipse: Ellipse, gap: tuple[float, float]
) -> None:
    """Paints the falx, a broken bright line along the major axis that spares the cavum.

    Args:
        rng: random source.
        canvas: painted on.
        ellipse: outer edge of the skull.
        gap: position of the cavum along the major axis and of the midline along the minor axis.
    """
    count = 40
    u = np.linspace(-0.9, 0.9, count)
    sway = np.cumsum(rng.normal(0.0, 0.004, count))
    strength = np.exp(np.interp(u, np.linspace(-0.9, 0.9, 14), rng.normal(-0.4, 1.5, 14)))
    strength = np.where(np.abs(u - gap[0]) < 0.14, 0.0, strength * rng.uniform(0.02, 0.1))
    canvas.stroke(ellipse.points(u, gap[1] + sway), strength[1:], 3.0, 4.0)
