"""From echo strength to gray levels, on the raster: speckle, attenuation, gain and compression."""

import math

import cv2
import numpy as np
from jaxtyping import Float32

from fetal_flax.data.phantoms.canvas import DB_TO_NEPER, LEVELS_FLUID, Canvas, smooth_noise
from fetal_flax.data.phantoms.geometry import BEAM_SPACING_PX, Head, Raster

_USUAL_PIXEL_SIZE_MM = 0.128  # median of HC18
_ENHANCEMENT_LIMIT_DB = 7.0
_ENHANCEMENT_DB_PER_PX = 0.03  # fluid does not absorb, but the depth gain assumes it does


def draw_resolution(rng: np.random.Generator, raster: Raster, head: Head) -> tuple[float, float]:
    """Draws the point spread function: its deviations in depth samples and in beams."""
    sample_mm = head.pixel_size_mm * raster.depth_step
    # Close views use higher frequencies, which are sharper but reach less deep.
    sharpness = math.sqrt(_USUAL_PIXEL_SIZE_MM / head.pixel_size_mm)
    axial = rng.uniform(0.15, 0.28) / (sample_mm * sharpness)
    lateral = rng.uniform(0.35, 0.7) / (sample_mm * sharpness * BEAM_SPACING_PX)
    return max(0.6, axial), max(0.6, lateral)


def echo_envelope(
    anatomy_rng: np.random.Generator,
    speckle_rng: np.random.Generator,
    canvas: Canvas,
    axial_sigma: float,
    lateral_sigma: float,
) -> Float32[np.ndarray, "depths beams"]:
    """Averages the envelopes of a few frames, as scanners do to calm the speckle."""
    amplitude = cv2.exp(canvas.level * np.float32(DB_TO_NEPER))
    frames = int(anatomy_rng.integers(1, 4))
    total = np.zeros_like(amplitude)
    for _ in range(frames):
        total += speckle_envelope(
            speckle_rng, amplitude, canvas.specular, axial_sigma, lateral_sigma
        )
    return total / np.float32(frames)


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


def compress(
    rng: np.random.Generator, envelope: Float32[np.ndarray, "depths beams"], canvas: Canvas
) -> Float32[np.ndarray, "depths beams"]:
    """Compresses the envelope to gray levels, 0 to 255: logarithm, then the gray map."""
    dynamic_range_db = rng.uniform(50.0, 60.0)
    decibels = cv2.log(envelope + np.float32(1e-6)) * np.float32(1.0 / DB_TO_NEPER)
    decibels += _gain(rng, canvas) - _attenuation(rng, canvas)
    shown = np.clip(1.0 + decibels / np.float32(dynamic_range_db), 0.0, 1.0)
    return np.float32(255.0) * cv2.pow(shown, rng.uniform(1.1, 1.5))


def _gain(rng: np.random.Generator, canvas: Canvas) -> Float32[np.ndarray, "depths beams"]:
    """Returns the gain in dB: depth sliders of the operator and uneven contact of the probe."""
    depths, beams = canvas.level.shape
    sliders = 2.5 * smooth_noise(rng, (depths, 1), (6, 1))
    sliders += np.linspace(0.0, rng.normal(-2.0, 4.0), depths, dtype=np.float32)[:, None]
    contact = 1.5 * smooth_noise(rng, (1, beams), (1, 10))
    contact += 0.6 * smooth_noise(rng, (1, beams), (1, 60))
    edge = np.abs(np.linspace(-1.0, 1.0, beams, dtype=np.float32))[None, :]
    contact -= np.float32(rng.uniform(0.0, 14.0)) * edge**3
    return sliders + contact + np.float32(rng.normal(0.0, 2.5))


def _attenuation(rng: np.random.Generator, canvas: Canvas) -> Float32[np.ndarray, "depths beams"]:
    """Returns the loss in dB down to each sample: shadows of bone, enhancement behind fluid."""
    step = np.float32(canvas.raster.depth_step)
    bone_path = np.cumsum(canvas.bone, axis=0, dtype=np.float32) * step
    # Sound scattered around the bone lights the shadow and blurs its edge.
    limit = rng.uniform(6.0, 18.0)
    shadow = limit - limit * cv2.exp(bone_path * np.float32(-rng.uniform(0.1, 0.3) / limit))
    shadow = cv2.blur(shadow, (max(1, round(30.0 / canvas.raster.depth_step)), 1))
    fluid = (canvas.level < LEVELS_FLUID[1] + 2.0).astype(np.uint8)
    fluid_path = np.cumsum(fluid, axis=0, dtype=np.float32) * step
    return shadow - np.minimum(fluid_path * _ENHANCEMENT_DB_PER_PX, _ENHANCEMENT_LIMIT_DB)


def calm_speckle(
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
