"""One phantom from its seed: head, probe, anatomy, echoes and screen, in this order."""

import dataclasses

import numpy as np
from jaxtyping import UInt8

from fetal_flax.data.phantoms.anatomy import paint_anatomy
from fetal_flax.data.phantoms.echo import calm_speckle, compress, draw_resolution, echo_envelope
from fetal_flax.data.phantoms.geometry import (
    REFERENCE_HEIGHT,
    REFERENCE_WIDTH,
    draw_head,
    draw_sector,
    lay_raster,
    to_image,
)
from fetal_flax.data.phantoms.screen import burn_in, scan_convert
from fetal_flax.measurement.ellipse import Ellipse


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
    head = draw_head(anatomy_rng)
    sector = draw_sector(anatomy_rng, head)
    raster = lay_raster(sector, head, scale)
    canvas = paint_anatomy(anatomy_rng, raster, head)
    axial_sigma, lateral_sigma = draw_resolution(anatomy_rng, raster, head)
    envelope = echo_envelope(anatomy_rng, speckle_rng, canvas, axial_sigma, lateral_sigma)
    screen = compress(anatomy_rng, envelope, canvas)
    screen = calm_speckle(anatomy_rng, screen, axial_sigma, lateral_sigma)
    image = scan_convert(screen, raster, height, width, scale)
    ellipse = to_image(head.ellipse, height, width, scale)
    burn_in(anatomy_rng, image)
    return Phantom(
        image=image,
        mask=ellipse.filled(height, width),
        pixel_size_mm=head.pixel_size_mm / scale,
        head_circumference_mm=head.circumference_mm,
        ellipse=ellipse,
    )
