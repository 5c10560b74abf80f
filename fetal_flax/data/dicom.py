"""Reading DICOM ultrasound: frames as grey images, and the size of their pixels.

Needs pydicom, the extra `dicom`. Which attributes say what: DICOM PS3.3, C.8.5.5 (ultrasound
regions), C.7.6.3 (pixels), C.11.2 (windows).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from fetal_flax.data.images import check_size
from fetal_flax.errors import InputError

SUFFIXES = (".dcm", ".dicom")
"""Usual endings; DICOM files often have none, so `is_dicom` looks inside."""

_MAGIC_OFFSET, _MAGIC = 128, b"DICM"
_SPATIAL_2D, _CENTIMETRES, _TISSUE = 1, 3, 1  # RegionSpatialFormat, PhysicalUnits, RegionDataType
_MM_PER_CM = 10
_SQUARE = 1e-3  # Relative difference of the two sides that is taken as rounding.


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(_MAGIC_OFFSET + len(_MAGIC))[_MAGIC_OFFSET:] == _MAGIC
    except OSError:
        return False


class DicomFile:
    """A DICOM file with one or more frames.

    Args:
        path: The file.

    Raises:
        InputError: pydicom isn't installed, or the file can't be read or holds no image.
    """

    def __init__(self, path: Path):
        self._path = path
        pydicom = _pydicom()
        try:
            self._dataset: Any = pydicom.dcmread(path)
            rows, columns = int(self._dataset.Rows), int(self._dataset.Columns)
            # A value of None stands for an attribute that is there and empty.
            self.frame_count = int(self._dataset.get("NumberOfFrames") or 1)
        except Exception as error:  # pydicom lets many kinds through.
            why = _in_one_line(error)
            raise InputError(f"{path} is no DICOM image that can be read: {why}") from None
        try:
            check_size(rows, columns)
        except InputError as error:
            raise InputError(f"{path} {error}") from None

    def frames(self) -> Iterator[UInt8[np.ndarray, "height width"]]:
        """Decodes one frame after another, as grey images.

        Raises:
            InputError: A frame can't be decoded.
        """
        pixels = _pydicom().pixels
        try:
            for frame in pixels.iter_pixels(self._dataset):
                yield self._to_gray(pixels, frame)
        except Exception as error:
            why = _in_one_line(error)
            raise InputError(f"{self._path} has pixels that can't be decoded: {why}") from None

    @property
    def pixel_size_mm(self) -> float | None:
        """Side of a pixel: the calibration of the 2-D tissue region, else the pixel spacing.

        None where the file has neither.

        Raises:
            InputError: Pixels aren't square, or regions differ in size.
        """
        sizes = {size for region in self._tissue_regions() if (size := _region_size(region))}
        spacing = self._dataset.get("PixelSpacing")
        if not sizes and spacing:
            sizes = {(float(spacing[1]), float(spacing[0]))}
        if len(sizes) > 1:
            raise InputError(
                f"{self._path} has regions of different pixel sizes: crop it to one, or give the "
                "size as --pixel-size-csv"
            )
        for width, height in sizes:
            if abs(width - height) > _SQUARE * height:
                raise InputError(
                    f"{self._path} has pixels of {width:.4g} × {height:.4g} mm: resample it to "
                    "square ones"
                )
            return height
        return None

    def _tissue_regions(self) -> Iterator[Any]:
        for region in self._dataset.get("SequenceOfUltrasoundRegions") or ():
            kind = (region.get("RegionSpatialFormat"), region.get("RegionDataType"))
            if kind == (_SPATIAL_2D, _TISSUE):
                yield region

    def _to_gray(self, pixels: Any, frame: np.ndarray) -> UInt8[np.ndarray, "height width"]:
        dataset = self._dataset
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            frame = pixels.apply_color_lut(frame, dataset)
        if frame.ndim == 3:
            return cv2.cvtColor(_to_bytes(frame, 0, np.iinfo(frame.dtype).max), cv2.COLOR_RGB2GRAY)
        lowest = -(2 ** (dataset.BitsStored - 1)) if dataset.PixelRepresentation else 0
        limits = np.array([lowest, lowest + 2**dataset.BitsStored - 1])
        low, high = pixels.apply_modality_lut(limits, dataset)
        shown = pixels.apply_voi_lut(pixels.apply_modality_lut(frame, dataset), dataset)
        gray = _to_bytes(shown, low, high)
        return 255 - gray if dataset.PhotometricInterpretation == "MONOCHROME1" else gray


def _to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Returns values from `low` to `high` as uint8 from 0 to 255."""
    shares = (values.astype(np.float64) - low) / (high - low)
    return np.round(255 * np.clip(shares, 0, 1)).astype(np.uint8)


def _region_size(region: Any) -> tuple[float, float] | None:
    """Returns width and height of a region's pixels in mm, or None if it isn't calibrated so."""
    units = (region.get("PhysicalUnitsXDirection"), region.get("PhysicalUnitsYDirection"))
    deltas = (region.get("PhysicalDeltaX"), region.get("PhysicalDeltaY"))
    if units != (_CENTIMETRES, _CENTIMETRES) or None in deltas or 0 in deltas:
        return None
    width, height = (abs(float(delta)) * _MM_PER_CM for delta in deltas)
    return width, height


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _pydicom() -> Any:
    """Returns the module pydicom.

    Raises:
        InputError: It isn't installed.
    """
    try:
        import pydicom
        import pydicom.pixels
    except ModuleNotFoundError:
        raise InputError(
            "DICOM files need pydicom: install it with pip install 'fetal_flax[dicom]'"
        ) from None
    return pydicom
