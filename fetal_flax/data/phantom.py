"""Procedural B-mode ultrasound phantoms of a fetal head with exactly known measurements.

Each phantom is an axial view of a fetal head as in the HC18 data set (van den Heuvel et al. 2018,
"Automated measurement of fetal head circumference using 2D ultrasound images"): a gray image, the
filled ellipse along the outer edge of the skull, the pixel size and the head circumference.

The image is made the way a scanner makes one:

1. draw the head (size, place, pixel size) and the convex probe that looks at it;
2. paint the anatomy, as echo strength, on a polar raster of depth samples by beams;
3. turn echo strength into speckle: random scatterers blurred by the point spread function;
4. attenuate along each beam, apply depth gain and compress the envelope logarithmically;
5. scan-convert the raster to pixels and burn in the marks of the screen.

The anatomy is drawn in *reference pixels*, those of an 800x540 image, whatever the size asked for:
x runs right, y runs down and pixel centres lie at integers. Only the number of raster samples and
of speckle draws depends on the size, so a seed gives the same head at every size.

Echo levels are in decibels relative to the brightest gray the display can show.
"""

import dataclasses
import math

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

from fetal_flax.measurement.ellipse import Ellipse

REFERENCE_HEIGHT = 540
REFERENCE_WIDTH = 800

# Ranges of HC18, 800x540 (a factor 800 / width coarser on smaller images).
PIXEL_SIZE_RANGE_MM = (0.05, 0.33)
HEAD_CIRCUMFERENCE_RANGE_MM = (60.0, 350.0)
_USUAL_PIXEL_SIZE_MM = 0.128  # median of HC18
CEPHALIC_INDEX_RANGE = (0.72, 0.86)  # biparietal / occipitofrontal diameter
# Below this circumference (about 14 weeks) the choroid plexus fills the head.
EARLY_CIRCUMFERENCE_MM = 110.0

# Share of phantoms, lower and upper head circumference in mm: the make-up of HC18.
_AGE_GROUPS = (
    (0.18, 60.0, EARLY_CIRCUMFERENCE_MM),
    (0.10, EARLY_CIRCUMFERENCE_MM, 160.0),
    (0.50, 160.0, 205.0),
    (0.22, 205.0, 350.0),
)
_CUT_PROBABILITY = 0.03  # heads that leave the image or the sector
_HEAD_MARGIN_PX = 8.0

# Echo levels in dB.
_LEVELS_FLUID = (-75.0, -54.0)  # haze of the side lobes
_LEVEL_TISSUE = -34.0
_LEVEL_BRAIN = -42.0
_BONE_GRAIN_DB = -3.0  # diffuse relative to specular echo of the skull

_ENHANCEMENT_LIMIT_DB = 7.0
_ENHANCEMENT_DB_PER_PX = 0.03  # fluid does not absorb, but the depth gain assumes it does

_BEAM_SPACING_PX = 1.5  # distance between beams at the depth of the head
_SUBPIXEL_BITS = 4  # fixed-point fraction of the coordinates cv2 draws with
# Depth below either face of the skull, as a share of its thickness, and the echo from there on.
_SKULL_LAYERS = ((0.04, 0.12), (0.14, 0.3), (0.26, 0.6), (0.38, 1.0))
_DB_TO_NEPER = math.log(10.0) / 20.0


@dataclasses.dataclass(frozen=True)
class Phantom:
    """One synthetic ultrasound image with its ground truth.

    Attributes:
        image: gray levels.
        mask: 255 inside the outer edge of the skull, 0 elsewhere.
        pixel_size_mm: side of a (square) pixel.
        head_circumference_mm: exact circumference of the ellipse.
        ellipse: outer edge of the skull, in pixels of this image.
    """

    image: UInt8[np.ndarray, "height width"]
    mask: UInt8[np.ndarray, "height width"]
    pixel_size_mm: float
    head_circumference_mm: float
    ellipse: Ellipse


@dataclasses.dataclass(frozen=True)
class _Head:
    """The head in reference pixels; `cut` heads may leave the image or the sector."""

    ellipse: Ellipse
    pixel_size_mm: float
    circumference_mm: float
    cut: bool

    @property
    def early(self) -> bool:
        return self.circumference_mm < EARLY_CIRCUMFERENCE_MM


@dataclasses.dataclass(frozen=True)
class _Sector:
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
        self, x: Float[np.ndarray, "*shape"], y: Float[np.ndarray, "*shape"]
    ) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
        """Returns distance from the apex and angle from the middle beam of positions."""
        dx, dy = x - self.apex_x, y - self.apex_y
        cos, sin = math.cos(self.tilt), math.sin(self.tilt)
        lateral, axial = dx * cos - dy * sin, dx * sin + dy * cos
        return np.hypot(lateral, axial), np.arctan2(lateral, axial)


@dataclasses.dataclass(frozen=True)
class _Raster:
    """Polar raster, depth samples by beams, over the part of the sector the image shows."""

    sector: _Sector
    first_depth: float
    depth_step: float
    beam_step: float
    depths: int
    beams: int

    def index(
        self, x: Float[np.ndarray, "*shape"], y: Float[np.ndarray, "*shape"]
    ) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
        """Returns the fractional beam and depth indices of positions in reference pixels."""
        radius, angle = self.sector.polar(x, y)
        beam = (angle + self.sector.half_angle) / self.beam_step
        return beam, (radius - self.first_depth) / self.depth_step


class _Canvas:
    """What the beams meet: maps over the raster, painted in order of appearance.

    Attributes:
        level: diffuse echo level in dB, as (depths, beams).
        specular: amplitude of mirror-like echoes, 1 being white, as (depths, beams).
        bone: 1 where sound is absorbed strongly, as (depths, beams).
    """

    def __init__(self, raster: _Raster, level: float) -> None:
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
        strength = amplitude * _incidence(self.raster.sector, points) ** specularity
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


def make_phantom(
    seed: int, index: int, *, height: int = REFERENCE_HEIGHT, width: int = REFERENCE_WIDTH
) -> Phantom:
    """Makes one phantom, the same for the same arguments.

    Args:
        seed: names the data set.
        index: names the phantom within it.
        height: rows of the image.
        width: columns of the image.

    Returns:
        The phantom. Other sizes show the same anatomy with other speckle; the whole 800x540
        scene is fitted into the image and centred.

    Example:
        >>> phantom = ff.make_phantom(0, 0, height=135, width=200)
        >>> phantom.image.shape, phantom.image.dtype, f"{phantom.head_circumference_mm:.0f} mm"
        ((135, 200), dtype('uint8'), '251 mm')
    """
    anatomy_rng, speckle_rng = np.random.default_rng([seed, index]).spawn(2)
    scale = min(height / REFERENCE_HEIGHT, width / REFERENCE_WIDTH)
    head = _draw_head(anatomy_rng)
    sector = _draw_sector(anatomy_rng, head)
    raster = _lay_raster(sector, head, scale)
    canvas = _paint_anatomy(anatomy_rng, raster, head)
    axial_sigma, lateral_sigma = _draw_resolution(anatomy_rng, raster, head)
    envelope = _echo_envelope(anatomy_rng, speckle_rng, canvas, axial_sigma, lateral_sigma)
    screen = _compress(anatomy_rng, envelope, canvas)
    screen = _calm_speckle(anatomy_rng, screen, axial_sigma, lateral_sigma)
    image = _scan_convert(screen, raster, height, width, scale)
    ellipse = _to_image(head.ellipse, height, width, scale)
    _burn_in(anatomy_rng, image)
    return Phantom(
        image=image,
        mask=ellipse.filled(height, width),
        pixel_size_mm=head.pixel_size_mm / scale,
        head_circumference_mm=head.circumference_mm,
        ellipse=ellipse,
    )


def speckle_envelope(
    rng: np.random.Generator,
    amplitude: Float32[np.ndarray, "depths beams"],
    specular: Float32[np.ndarray, "depths beams"],
    axial_sigma: float,
    lateral_sigma: float,
) -> Float32[np.ndarray, "depths beams"]:
    """Simulates the detected envelope of one ultrasound frame before compression.

    Many scatterers per resolution cell make the echo a circular complex Gaussian, so that its
    envelope is Rayleigh distributed where there is no specular echo, with a mean to standard
    deviation ratio of 1.91 (Wagner et al. 1983, "Statistics of speckle in ultrasound B-scans").
    The Gaussian point spread function has a constant width in beams: it widens with depth.

    Args:
        rng: source of the scatterers.
        amplitude: root mean square amplitude of the diffuse echoes.
        specular: amplitude of the mirror-like echoes, all in phase.
        axial_sigma: standard deviation of the pulse, depth samples.
        lateral_sigma: standard deviation of the beam profile, beams.

    Returns:
        The envelope, its mean square being that of `amplitude` in homogeneous regions.
    """
    axial, lateral = _gaussian_kernel(axial_sigma), _gaussian_kernel(lateral_sigma)
    # Blurring unit white noise leaves this amplitude in each of the two quadratures.
    gain = amplitude / np.float32(math.sqrt(2.0) * np.linalg.norm(axial) * np.linalg.norm(lateral))
    in_phase, quadrature = (
        rng.standard_normal(amplitude.shape, dtype=np.float32) * gain for _ in range(2)
    )
    in_phase += specular
    return cv2.magnitude(
        cv2.sepFilter2D(in_phase, cv2.CV_32F, lateral, axial),
        cv2.sepFilter2D(quadrature, cv2.CV_32F, lateral, axial),
    )


def _gaussian_kernel(sigma: float) -> np.ndarray:
    """Returns a Gaussian of unit sum, cut at three standard deviations."""
    return cv2.getGaussianKernel(2 * math.ceil(3.0 * sigma) + 1, sigma, cv2.CV_32F)


# --- Head and probe -------------------------------------------------------------------------


def _draw_head(rng: np.random.Generator) -> _Head:
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
    return _Head(ellipse, circumference_mm / ellipse.circumference, circumference_mm, cut)


def _draw_sector(rng: np.random.Generator, head: _Head) -> _Sector:
    """Draws a probe of natural size, at a natural depth above the head, that sees all of it."""
    outline = head.ellipse.points(*_unit_circle(64))
    near = rng.uniform(40.0, 62.0) / head.pixel_size_mm
    skin_depth = rng.uniform(12.0, 42.0) / head.pixel_size_mm
    face_y = min(outline[:, 1].min() - skin_depth, 60.0)
    tilt = rng.normal(0.0, 0.15 if rng.random() < 0.1 else 0.03)

    # The probe turns about the middle of the image.
    distance = REFERENCE_HEIGHT / 2 - face_y + near
    sector = _Sector(
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


def _lay_raster(sector: _Sector, head: _Head, scale: float) -> _Raster:
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
    beam_step = _BEAM_SPACING_PX / (scale * head_depth)
    return _Raster(
        sector=sector,
        first_depth=nearest,
        depth_step=depth_step,
        beam_step=beam_step,
        depths=math.ceil((farthest - nearest) / depth_step),
        beams=math.ceil(2.0 * sector.half_angle / beam_step),
    )


def _to_image(ellipse: Ellipse, height: int, width: int, scale: float) -> Ellipse:
    """Converts an ellipse from reference pixels to pixels of the image."""
    return Ellipse(
        center_x=width / 2 + (ellipse.center_x + 0.5 - REFERENCE_WIDTH / 2) * scale - 0.5,
        center_y=height / 2 + (ellipse.center_y + 0.5 - REFERENCE_HEIGHT / 2) * scale - 0.5,
        semi_major=ellipse.semi_major * scale,
        semi_minor=ellipse.semi_minor * scale,
        angle=ellipse.angle,
    )


# --- Shapes ---------------------------------------------------------------------------------


def _unit_circle(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cosines and sines of `count` directions around the circle."""
    directions = np.arange(count) * (2.0 * math.pi / count)
    return np.cos(directions), np.sin(directions)


def _wobble(rng: np.random.Generator, count: int, size: float, harmonics: int) -> np.ndarray:
    """Returns a smooth periodic random curve of `count` values, standard deviation `size`."""
    directions = np.arange(count) * (2.0 * math.pi / count)
    orders = np.arange(2, harmonics + 2)
    weights = rng.normal(0.0, 1.0, (2, harmonics)) * size / math.sqrt(harmonics)
    waves = np.outer(orders, directions)
    return weights[0] @ np.cos(waves) + weights[1] @ np.sin(waves)


def _blob(
    rng: np.random.Generator,
    ellipse: Ellipse,
    center: tuple[float, float],
    size: tuple[float, float],
    roughness: float = 0.1,
) -> Float[np.ndarray, "points 2"]:
    """Returns the outline of an irregular blob, placed and sized in semi-axes of the ellipse."""
    count = 48
    cos, sin = _unit_circle(count)
    radius = 1.0 + _wobble(rng, count, roughness, 5)
    return ellipse.points(center[0] + size[0] * radius * cos, center[1] + size[1] * radius * sin)


def _curve(
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


def _fading(count: int) -> Float[np.ndarray, " segments"]:
    """Returns the strength of the segments of a line that fades out towards both ends."""
    return np.sin(math.pi * (np.arange(count) + 0.5) / count)


def _incidence(
    sector: _Sector, points: Float[np.ndarray, "points 2"]
) -> Float[np.ndarray, " segments"]:
    """Returns, per segment, the cosine between the beam and the normal of the segment."""
    tangent = np.diff(points, axis=0)
    beam = (points[1:] + points[:-1]) / 2.0 - (sector.apex_x, sector.apex_y)
    cross = tangent[:, 0] * beam[:, 1] - tangent[:, 1] * beam[:, 0]
    lengths = np.hypot(*tangent.T) * np.hypot(*beam.T)
    return np.abs(cross) / np.maximum(lengths, 1e-9)


def _smooth_noise(
    rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int]
) -> Float32[np.ndarray, "depths beams"]:
    """Returns smooth noise of about unit deviation; the pattern does not depend on the shape."""
    coarse = rng.standard_normal(cells, dtype=np.float32)
    return cv2.resize(coarse, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)


# --- Anatomy --------------------------------------------------------------------------------


def _paint_anatomy(rng: np.random.Generator, raster: _Raster, head: _Head) -> _Canvas:
    """Paints everything between the skin and the far end of the sector, back to front."""
    canvas = _Canvas(raster, _LEVEL_TISSUE + rng.normal(-1.0, 4.0))
    _paint_surroundings(rng, canvas, head)
    _paint_interfaces(rng, canvas)
    _paint_fluid(rng, canvas, head)
    _paint_abdominal_wall(rng, canvas, head)
    if rng.random() < 0.35:
        _paint_limb(rng, canvas, head)
    _paint_skull_and_brain(rng, canvas, head)
    _add_texture(rng, canvas)
    return canvas


def _paint_surroundings(rng: np.random.Generator, canvas: _Canvas, head: _Head) -> None:
    """Paints placenta, and bright and dark tissue of mother and fetus around the head."""
    ellipse = head.ellipse
    for _ in range(rng.integers(2, 6)):
        direction = rng.uniform(0.0, 2.0 * math.pi)
        distance = rng.uniform(1.2, 1.9)
        center = (distance * math.cos(direction), distance * math.sin(direction))
        size = (rng.uniform(0.2, 0.7), rng.uniform(0.2, 0.5))
        canvas.region(_blob(rng, ellipse, center, size, 0.2), _LEVEL_TISSUE + rng.normal(0.0, 6.0))
    for side in (-1.0, 1.0):
        # Tissue that bears on the ends of the head is often seen bright, past the edge shadow.
        center = (side * rng.uniform(1.15, 1.5), rng.uniform(-0.1, 0.8))
        size = (rng.uniform(0.1, 0.3), rng.uniform(0.15, 0.4))
        canvas.region(_blob(rng, ellipse, center, size, 0.2), _LEVEL_TISSUE + rng.uniform(0, 12))
    if rng.random() < 0.45:
        side = rng.choice([-1.0, 1.0])
        center = (side * rng.uniform(0.3, 2.2), rng.choice([-1.0, 1.0]) * rng.uniform(1.2, 2.0))
        size = (rng.uniform(0.8, 1.6), rng.uniform(0.6, 1.0))
        canvas.region(
            _blob(rng, ellipse, center, size, 0.06), _LEVEL_TISSUE + rng.uniform(3.0, 8.0)
        )


def _paint_interfaces(rng: np.random.Generator, canvas: _Canvas) -> None:
    """Paints sheets between tissues, anywhere in the sector, mostly square to the beams."""
    sector = canvas.raster.sector
    deepest = canvas.raster.depths * canvas.raster.depth_step
    top = canvas.raster.first_depth - sector.near
    for _ in range(rng.integers(5, 45)):
        span = rng.uniform(0.04, 0.3)
        start = rng.uniform(-1.0, 1.0 - span)
        slope = np.cumsum(rng.normal(rng.normal(0.0, 2.0), 1.0, 9))
        arc = _arc(sector, top + rng.uniform(0.0, deepest) + slope, start, start + span)
        canvas.stroke(arc, _fading(8) * rng.uniform(0.01, 0.1), rng.uniform(2.0, 5.0))


def _paint_abdominal_wall(rng: np.random.Generator, canvas: _Canvas, head: _Head) -> None:
    """Paints skin, fat and muscle: bright sheets along the probe face, and its reverberation."""
    sector, pixel_size = canvas.raster.sector, head.pixel_size_mm
    underside = rng.uniform(6.0, 14.0) + np.cumsum(rng.normal(0.0, 0.5, 17))
    band = np.vstack(
        [_arc(sector, np.zeros(17), -1.1, 1.1), _arc(sector, underside / pixel_size, 1.1, -1.1)]
    )
    canvas.region(band, _LEVEL_TISSUE + rng.normal(0.0, 3.0))
    for _ in range(rng.integers(15, 60)):
        span = rng.uniform(0.1, 0.5)
        start = rng.uniform(-1.0, 1.0 - span)
        depth_mm = rng.triangular(0.5, 5.0, 22.0) + np.cumsum(rng.normal(0.0, 0.12, 13))
        arc = _arc(sector, depth_mm / pixel_size, start, start + span)
        canvas.stroke(arc, _fading(12) * rng.uniform(0.02, 0.12), 0.3 / pixel_size)
    ring_step = rng.uniform(0.9, 1.8)
    for ring in range(4):
        arc = _arc(sector, np.full(33, (ring + 0.5) * ring_step / pixel_size), -1.0, 1.0)
        amplitude = rng.uniform(0.05, 0.15) / (1.0 + ring)
        canvas.stroke(arc, amplitude * rng.uniform(0.3, 1.0, 32), 0.4 / pixel_size)


def _arc(
    sector: _Sector, depth: Float[np.ndarray, " points"], start: float, end: float
) -> Float[np.ndarray, "points 2"]:
    """Returns a line along the probe face: depths below it, between shares of the half angle."""
    angle = sector.tilt + sector.half_angle * np.linspace(start, end, len(depth))
    radius = sector.near + depth
    return np.stack(
        [sector.apex_x + radius * np.sin(angle), sector.apex_y + radius * np.cos(angle)], axis=-1
    )


def _paint_fluid(rng: np.random.Generator, canvas: _Canvas, head: _Head) -> None:
    """Paints a cavity of amniotic fluid behind the head, with a faintly reflecting wall."""
    if rng.random() > (0.95 if head.early else 0.6):
        return
    ellipse = head.ellipse
    spread = (1.3, 2.3) if head.early else (1.02, 1.45)
    center = (rng.normal(0.0, 0.35), rng.normal(-0.1, 0.25))
    size = (rng.uniform(*spread), rng.uniform(*spread))
    wall = _blob(rng, ellipse, center, size, 0.04)
    canvas.region(wall, rng.uniform(*_LEVELS_FLUID))
    canvas.stroke(np.vstack([wall, wall[:1]]), rng.uniform(0.01, 0.06), 3.0, specularity=8.0)


def _paint_limb(rng: np.random.Generator, canvas: _Canvas, head: _Head) -> None:
    """Paints a distractor beside the head: a row of bright bones, as of a spine or a hand."""
    side = rng.choice([-1.0, 1.0])
    u, v = side * rng.uniform(1.1, 1.35), rng.uniform(-0.7, 0.7)
    canvas.region(_blob(rng, head.ellipse, (u, v), (0.22, 0.3)), _LEVEL_TISSUE)
    slope, step = rng.normal(0.0, 0.5), rng.uniform(0.06, 0.12)
    for bone in range(rng.integers(1, 6)):
        start = (u + side * bone * step, v + slope * bone * step)
        end = (start[0] + 0.6 * step, start[1] + rng.normal(0.0, 0.05))
        points = _curve(rng, head.ellipse, start, end)
        canvas.stroke(points, _fading(8) * rng.uniform(0.2, 0.8), 5.0, 1.0)


def _paint_skull_and_brain(rng: np.random.Generator, canvas: _Canvas, head: _Head) -> None:
    """Paints the head over what lies behind it."""
    count = 240
    cos, sin = _unit_circle(count)
    # Real skulls are not quite ellipses: the ground truth is the ellipse that fits them.
    shape = 1.0 + _wobble(rng, count, 0.006, 3)
    thickness = rng.uniform(0.08, 0.12) if head.early else rng.uniform(0.055, 0.095)
    thickness = thickness * (1.0 + _wobble(rng, count, 0.18, 8))

    def contour(depth: float) -> np.ndarray:
        """Returns the skull at a share of its thickness below its outer edge."""
        radius = shape - depth * thickness
        return head.ellipse.points(radius * cos, radius * sin)

    outline = contour(0.0)
    scalp = 1.0 + rng.uniform(0.02, 0.09) * (1.0 + _wobble(rng, count, 0.3, 4))
    canvas.region(
        head.ellipse.points(scalp * cos, scalp * sin), _LEVEL_TISSUE - rng.uniform(0.0, 16.0)
    )
    canvas.region(outline, _LEVEL_BRAIN)
    if head.early:
        _paint_early_brain(rng, canvas, head.ellipse)
    else:
        _paint_brain(rng, canvas, head.ellipse)

    facing = _incidence(canvas.raster.sector, np.vstack([outline, outline[:1]]))
    floor = rng.uniform(0.02, 0.08)
    amplitude = rng.uniform(0.6, 1.8) * (floor + (1.0 - floor) * facing ** rng.uniform(2.5, 7.0))
    amplitude = amplitude * np.exp(_wobble(rng, count, 0.65, 14)) * _dropouts(rng, count)
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
    return np.exp(-_DB_TO_NEPER * loss_db)


def _paint_early_brain(rng: np.random.Generator, canvas: _Canvas, ellipse: Ellipse) -> None:
    """Paints a head of the first trimester: two large choroid plexuses beside the midline."""
    bright = _LEVEL_BRAIN + rng.uniform(8.0, 14.0)
    for side in (-1.0, 1.0):
        center = (rng.uniform(-0.3, 0.0), side * rng.uniform(0.38, 0.45))
        size = (rng.uniform(0.45, 0.65), rng.uniform(0.28, 0.38))
        canvas.region(_blob(rng, ellipse, center, size, 0.18), bright)
    for _ in range(rng.integers(4, 10)):
        direction = rng.uniform(0.0, 2.0 * math.pi)
        center = (0.65 * math.cos(direction), 0.65 * math.sin(direction))
        size = (rng.uniform(0.06, 0.2), rng.uniform(0.06, 0.14))
        canvas.region(_blob(rng, ellipse, center, size, 0.2), _LEVEL_BRAIN - rng.uniform(4.0, 20.0))
    _paint_midline(rng, canvas, ellipse, gap=(0.3, rng.normal(0.0, 0.03)))


def _paint_brain(rng: np.random.Generator, canvas: _Canvas, ellipse: Ellipse) -> None:
    """Paints the plane of the biparietal diameter: midline, thalami, cavum and ventricles.

    Positions are in semi-axes: u towards the forehead, v away from the probe.
    """
    forehead = rng.choice([-1.0, 1.0])
    middle = rng.normal(0.0, 0.03)

    def blob(u: float, v: float, size: tuple[float, float], level: float) -> None:
        du, dv = rng.normal(0.0, 0.03, 2)
        outline = _blob(rng, ellipse, (forehead * (u + du), middle + v + dv), size)
        canvas.region(outline, _LEVEL_BRAIN + level * rng.uniform(0.3, 1.2))

    def line(u: tuple[float, float], v: tuple[float, float], amplitude: float) -> None:
        du = rng.normal(0.0, 0.03, 2)
        start = (forehead * (u[0] + du[0]), middle + v[0] + rng.normal(0.0, 0.015))
        end = (forehead * (u[1] + du[1]), middle + v[1] + rng.normal(0.0, 0.015))
        strength = amplitude * math.exp(rng.normal(-0.5, 0.8))
        canvas.stroke(
            _curve(rng, ellipse, start, end), strength * _fading(8), rng.uniform(2.0, 5.0), 4.0
        )

    contrast = rng.uniform(0.5, 1.1)  # how well this plane shows the landmarks
    # Reverberation of the near skull veils the upper half of the brain.
    canvas.region(_blob(rng, ellipse, (0.0, -0.5), (0.75, 0.38)), _LEVEL_BRAIN + rng.uniform(0, 5))
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
    rng: np.random.Generator, canvas: _Canvas, ellipse: Ellipse, gap: tuple[float, float]
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


def _add_texture(rng: np.random.Generator, canvas: _Canvas) -> None:
    """Softens the borders between tissues and makes each tissue uneven."""
    shape = canvas.level.shape
    soft = max(0.8, 2.0 / canvas.raster.depth_step)
    cv2.GaussianBlur(canvas.level, (0, 0), soft, dst=canvas.level)
    # Reflectors are rough: their echo comes and goes along them.
    canvas.specular *= cv2.exp(0.5 * _smooth_noise(rng, shape, (90, 140)))
    for cells, size in (((5, 4), 5.0), ((24, 16), 2.0), ((60, 40), 2.5), ((110, 25), 2.0)):
        canvas.level += rng.uniform(0.3, 1.2) * size * _smooth_noise(rng, shape, cells)


# --- Echoes ---------------------------------------------------------------------------------


def _draw_resolution(rng: np.random.Generator, raster: _Raster, head: _Head) -> tuple[float, float]:
    """Draws the point spread function: its deviations in depth samples and in beams."""
    sample_mm = head.pixel_size_mm * raster.depth_step
    # Close views use higher frequencies, which are sharper but reach less deep.
    sharpness = math.sqrt(_USUAL_PIXEL_SIZE_MM / head.pixel_size_mm)
    axial = rng.uniform(0.15, 0.28) / (sample_mm * sharpness)
    lateral = rng.uniform(0.35, 0.7) / (sample_mm * sharpness * _BEAM_SPACING_PX)
    return max(0.6, axial), max(0.6, lateral)


def _echo_envelope(
    anatomy_rng: np.random.Generator,
    speckle_rng: np.random.Generator,
    canvas: _Canvas,
    axial_sigma: float,
    lateral_sigma: float,
) -> Float32[np.ndarray, "depths beams"]:
    """Averages the envelopes of a few frames, as scanners do to calm the speckle."""
    amplitude = cv2.exp(canvas.level * np.float32(_DB_TO_NEPER))
    frames = int(anatomy_rng.integers(1, 4))
    total = np.zeros_like(amplitude)
    for _ in range(frames):
        total += speckle_envelope(
            speckle_rng, amplitude, canvas.specular, axial_sigma, lateral_sigma
        )
    return total / np.float32(frames)


def _attenuation(rng: np.random.Generator, canvas: _Canvas) -> Float32[np.ndarray, "depths beams"]:
    """Returns the loss in dB down to each sample: shadows of bone, enhancement behind fluid."""
    step = np.float32(canvas.raster.depth_step)
    bone_path = np.cumsum(canvas.bone, axis=0, dtype=np.float32) * step
    # Sound scattered around the bone lights the shadow and blurs its edge.
    limit = rng.uniform(6.0, 18.0)
    shadow = limit - limit * cv2.exp(bone_path * np.float32(-rng.uniform(0.1, 0.3) / limit))
    shadow = cv2.blur(shadow, (max(1, round(30.0 / canvas.raster.depth_step)), 1))
    fluid = (canvas.level < _LEVELS_FLUID[1] + 2.0).astype(np.uint8)
    fluid_path = np.cumsum(fluid, axis=0, dtype=np.float32) * step
    return shadow - np.minimum(fluid_path * _ENHANCEMENT_DB_PER_PX, _ENHANCEMENT_LIMIT_DB)


def _gain(rng: np.random.Generator, canvas: _Canvas) -> Float32[np.ndarray, "depths beams"]:
    """Returns the gain in dB: depth sliders of the operator and uneven contact of the probe."""
    depths, beams = canvas.level.shape
    sliders = 2.5 * _smooth_noise(rng, (depths, 1), (6, 1))
    sliders += np.linspace(0.0, rng.normal(-2.0, 4.0), depths, dtype=np.float32)[:, None]
    contact = 1.5 * _smooth_noise(rng, (1, beams), (1, 10))
    contact += 0.6 * _smooth_noise(rng, (1, beams), (1, 60))
    edge = np.abs(np.linspace(-1.0, 1.0, beams, dtype=np.float32))[None, :]
    contact -= np.float32(rng.uniform(0.0, 14.0)) * edge**3
    return sliders + contact + np.float32(rng.normal(0.0, 2.5))


def _compress(
    rng: np.random.Generator, envelope: Float32[np.ndarray, "depths beams"], canvas: _Canvas
) -> Float32[np.ndarray, "depths beams"]:
    """Compresses the envelope to gray levels, 0 to 255: logarithm, then the gray map."""
    dynamic_range_db = rng.uniform(50.0, 60.0)
    decibels = cv2.log(envelope + np.float32(1e-6)) * np.float32(1.0 / _DB_TO_NEPER)
    decibels += _gain(rng, canvas) - _attenuation(rng, canvas)
    shown = np.clip(1.0 + decibels / np.float32(dynamic_range_db), 0.0, 1.0)
    return np.float32(255.0) * cv2.pow(shown, rng.uniform(1.1, 1.5))


def _calm_speckle(
    rng: np.random.Generator,
    screen: Float32[np.ndarray, "depths beams"],
    axial_sigma: float,
    lateral_sigma: float,
) -> Float32[np.ndarray, "depths beams"]:
    """Blends in a blurred copy, about what the speckle reduction of a scanner does."""
    strength, width = rng.uniform(0.2, 0.95), rng.uniform(0.8, 1.6)
    smooth = cv2.GaussianBlur(
        screen, (0, 0), sigmaX=width * lateral_sigma, sigmaY=width * axial_sigma
    )
    return cv2.addWeighted(screen, 1.0 - strength, smooth, strength, 0.0)


def _scan_convert(
    screen: Float32[np.ndarray, "depths beams"],
    raster: _Raster,
    height: int,
    width: int,
    scale: float,
) -> UInt8[np.ndarray, "height width"]:
    """Resamples the raster to pixels; outside the sector the image is black."""
    columns, rows = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
    x = (columns + 0.5 - width / 2) / scale + REFERENCE_WIDTH / 2 - 0.5
    y = (rows + 0.5 - height / 2) / scale + REFERENCE_HEIGHT / 2 - 0.5
    beam, depth = raster.index(x[None, :].astype(np.float32), y[:, None].astype(np.float32))
    image = cv2.remap(
        screen, beam.astype(np.float32), depth.astype(np.float32), cv2.INTER_LINEAR, borderValue=0
    )
    return image.round().astype(np.uint8)


# --- Screen ---------------------------------------------------------------------------------


def _burn_in(rng: np.random.Generator, image: UInt8[np.ndarray, "height width"]) -> None:
    """Draws the marks of the screen over the image, in place.

    HC18 has a gray-scale bar on the left and black boxes where text was removed.
    """
    if rng.random() < 0.6:
        _fill(image, 0, rng.uniform(0.75, 0.9), rng.uniform(0.77, 0.87), 1.0, 1.0)
    if rng.random() < 0.2:
        _fill(image, 0, 0.0, rng.uniform(0.82, 0.92), rng.uniform(0.1, 0.2), 1.0)
    if rng.random() < 0.9:
        _gray_bar(image)
    _glyphs(rng, image, 0.035, 0.08, 0.03, int(rng.integers(20, 50)))
    if rng.random() < 0.15:
        _depth_ticks(image)
    if rng.random() < 0.1:
        _glyphs(rng, image, 0.96, 0.05, 0.2, int(rng.integers(80, 200)))


def _fill(
    image: UInt8[np.ndarray, "height width"],
    value: int,
    top: float,
    left: float,
    bottom: float,
    right: float,
) -> None:
    """Fills a box whose edges are shares of the image."""
    height, width = image.shape
    rows = slice(round(top * height), round(bottom * height))
    image[rows, round(left * width) : round(right * width)] = value


def _gray_bar(image: UInt8[np.ndarray, "height width"]) -> None:
    """Draws the gray-scale bar down the left margin."""
    height, width = image.shape
    top, bottom = round(0.045 * height), round(0.34 * height)
    ramp = np.linspace(250, 5, bottom - top).astype(np.uint8)
    image[top:bottom, : max(1, round(0.009 * width))] = ramp[:, None]


def _depth_ticks(image: UInt8[np.ndarray, "height width"]) -> None:
    """Draws the depth scale down the right margin."""
    height, width = image.shape
    rows = np.linspace(0.05, 0.95, 10) * height
    image[rows.astype(int), width - max(2, round(0.012 * width)) :] = 140


def _glyphs(
    rng: np.random.Generator,
    image: UInt8[np.ndarray, "height width"],
    top: float,
    left: float,
    length: float,
    value: int,
) -> None:
    """Draws a line of random blocks that reads as small text; places are shares of the image."""
    height, width = image.shape
    ink = (rng.random((5, 24)) < 0.5).astype(np.uint8)
    ink[:, 3::4] = 0
    size = (max(1, round(length * width)), max(1, round(0.02 * height)))
    ink = cv2.resize(ink, size, interpolation=cv2.INTER_NEAREST)
    row, column = round(top * height), round(left * width)
    patch = image[row : row + size[1], column : column + size[0]]
    np.maximum(patch, ink[: patch.shape[0], : patch.shape[1]] * np.uint8(value), out=patch)
