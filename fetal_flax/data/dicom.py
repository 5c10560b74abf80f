"""Reading DICOM ultrasound: frames as grey images, and the size of their pixels.

Needs pydicom, the extra `dicom`. Which attributes say what: DICOM PS3.3, C.8.5.5 (ultrasound
regions), C.7.6.3 (pixels), C.11.2 (windows).
"""

import itertools
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from fetal_flax.data.hc18.measurements import MOST_MM
from fetal_flax.data.images import check_size, significant_bits
from fetal_flax.errors import InputError, printable

SUFFIXES = (".dcm", ".dicom")
"""Usual endings; DICOM files often have none, so `is_dicom` looks inside."""

_MAGIC_OFFSET, _MAGIC = 128, b"DICM"
_SPATIAL_2D, _CENTIMETRES, _TISSUE = 1, 3, 1  # RegionSpatialFormat, PhysicalUnits, RegionDataType
_MM_PER_CM = 10
_SQUARE = 1e-3  # Relative difference of the two sides that is taken as rounding.
_GIVE_SIZE = "give the size as --pixel-size or --pixel-size-csv"


class NoImageError(InputError):
    """A DICOM file that is intact and holds no image: a directory, a report, a measurement.

    Args:
        path: The file.
        kind: What it is, in plain words.
    """

    def __init__(self, path: Path, kind: str):
        super().__init__(f"{path} holds no image: it is a {kind}")
        self.kind = kind


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
    """A DICOM file with one or more frames; also one without the preamble, as old scanners write.

    Args:
        path: The file.

    Raises:
        NoImageError: The file holds something else than an image.
        InputError: pydicom isn't installed, or the file can't be read.
    """

    def __init__(self, path: Path):
        self._path = path
        pydicom = _pydicom()
        try:
            self._dataset: Any = pydicom.dcmread(path, force=not is_dicom(path))
            meta = self._dataset.file_meta
            if "TransferSyntaxUID" not in meta:
                meta.TransferSyntaxUID = _guessed_syntax(self._dataset)
        except Exception as error:  # pydicom lets many kinds through.
            why = _in_one_line(error)
            raise InputError(f"{path} is no DICOM image that can be read: {why}") from None
        if "Rows" not in self._dataset and "PixelData" not in self._dataset:
            if not is_dicom(path) and "SOPClassUID" not in self._dataset:
                raise InputError(f"{path} is no DICOM image that can be read: it is no DICOM file")
            raise NoImageError(path, self._kind())
        try:
            rows, columns = int(self._dataset.Rows), int(self._dataset.Columns)
            # A value of None stands for an attribute that is there and empty.
            self.frame_count = int(self._dataset.get("NumberOfFrames") or 1)
            if self.frame_count < 1:
                raise ValueError(f"it has {self.frame_count} frames")
        except Exception as error:
            why = _in_one_line(error)
            raise InputError(f"{path} is no DICOM image that can be read: {why}") from None
        try:
            check_size(rows, columns)
        except InputError as error:
            raise InputError(f"{path} {error}") from None

    def _kind(self) -> str:
        """Returns what a file without an image is, in plain words."""
        try:
            meta = self._dataset.file_meta
            uid = meta.get("MediaStorageSOPClassUID") or self._dataset.get("SOPClassUID")
            name = str(getattr(uid, "name", ""))
        except Exception:  # A value of a kind that pydicom doesn't know.
            name = ""
        if "Directory" in name:
            return "DICOM directory file"
        return f"DICOM {'structured report' if 'SR' in name.split() else 'file without an image'}"

    def frames(self) -> Iterator[UInt8[np.ndarray, "height width"]]:
        """Decodes one frame after another, as grey images.

        Raises:
            InputError: A frame can't be decoded.
        """
        pixels = _pydicom().pixels
        try:
            # More pixels than frames are padding, to this reader.
            for frame in itertools.islice(pixels.iter_pixels(self._dataset), self.frame_count):
                yield self._to_gray(pixels, frame)
        except Exception as error:
            why = _in_one_line(error)
            raise InputError(
                f"{self._path} has pixels that can't be decoded ({why}): export it again, "
                "uncompressed or as PNG"
            ) from None

    @property
    def pixel_size_mm(self) -> float | None:
        """Side of a pixel: the calibration of the 2-D tissue region, else the pixel spacing.

        None where the file has neither.

        Raises:
            InputError: A size can't be read or isn't positive and finite, pixels aren't square, or
                regions differ in size.
        """
        try:
            sizes = {size for region in self._tissue_regions() if (size := _region_size(region))}
            if not sizes and (spacing := self._dataset.get("PixelSpacing")):
                height, width = map(float, spacing)
                sizes = {(width, height)}
            tall, wide = 1.0, 1.0
            if not sizes and (aspect := self._dataset.get("PixelAspectRatio")):
                tall, wide = map(float, aspect)
        except Exception:  # As many kinds as there are ways to write no number.
            raise InputError(
                f"{self._path} has a pixel size that can't be read, since it is not two numbers of "
                f"millimetres: {_GIVE_SIZE}"
            ) from None
        for side in (side for size in sizes for side in size):
            if not 0 < side < MOST_MM:
                raise InputError(
                    f"{self._path} has {side:g} mm as the size of its pixels, not a positive "
                    f"number below {MOST_MM}: {_GIVE_SIZE}"
                )
        if not _are_alike(tall, wide):
            raise InputError(
                f"{self._path} has pixels that are {tall:g} high and {wide:g} wide: resample it to "
                "square ones"
            )
        widest, tallest = max(sizes, default=(0.0, 0.0))
        if not all(_are_alike(w, widest) and _are_alike(h, tallest) for w, h in sizes):
            raise InputError(
                f"{self._path} has regions of different pixel sizes: crop it to one, or give the "
                "size as --pixel-size-csv"
            )
        for width, height in sizes:
            if not _are_alike(width, height):
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
        if dataset.get("HighBit") not in (None, dataset.BitsStored - 1):
            raise ValueError(f"its values end at bit {dataset.HighBit} of {dataset.BitsStored}")
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            frame = pixels.apply_color_lut(frame, dataset)
        if frame.ndim == 3:
            most = 2 ** significant_bits(frame) - 1
            return cv2.cvtColor(_to_bytes(frame, 0, most), cv2.COLOR_RGB2GRAY)
        bits = dataset.BitsStored
        # A table or a window says what is shown, else the values themselves do.
        table = next(iter(dataset.get("VOILUTSequence") or ()), {})
        descriptor, entries = table.get("LUTDescriptor"), table.get("LUTData")
        modality = next(iter(dataset.get("ModalityLUTSequence") or ()), None)
        has_window = None not in (dataset.get("WindowCenter"), dataset.get("WindowWidth"))
        is_signed = dataset.PixelRepresentation and (has_window or frame.min() < 0)
        lowest = -(2 ** (bits - 1)) if is_signed else 0
        if not (has_window or is_signed):
            bits = min(bits - dataset.PixelRepresentation, significant_bits(frame))
        limits = np.array([lowest, lowest + 2**bits - 1])
        low, high = pixels.apply_modality_lut(limits, dataset).tolist()
        if descriptor is not None and entries is not None:
            low, high = 0, 2 ** descriptor[2] - 1
        elif has_window and modality:  # Windows spread over all bits of the table below them.
            low, high = 0, 2 ** modality.LUTDescriptor[2] - 1
        elif not has_window:  # Whose values go down where the slope does, too.
            low, high = sorted((low, high))
        shown = pixels.apply_voi_lut(pixels.apply_modality_lut(frame, dataset), dataset)
        gray = _to_bytes(shown, low, high)
        return 255 - gray if dataset.PhotometricInterpretation == "MONOCHROME1" else gray


def _are_alike(one: float, other: float) -> bool:
    """Whether two sides of pixels are as long but for rounding."""
    return abs(one - other) <= _SQUARE * other


def _to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Returns values from `low` to `high` as uint8 from 0 to 255."""
    if not (high != low and np.isfinite(values).all()):
        raise ValueError("its slope or window gives no numbers")
    shares = (values.astype(np.float64) - low) / (high - low)
    return np.round(255 * np.clip(shares, 0, 1)).astype(np.uint8)


def _region_size(region: Any) -> tuple[float, float] | None:
    """Returns width and height of a region's pixels in mm, or None if it isn't calibrated so."""
    units = (region.get("PhysicalUnitsXDirection"), region.get("PhysicalUnitsYDirection"))
    deltas = (region.get("PhysicalDeltaX"), region.get("PhysicalDeltaY"))
    if units != (_CENTIMETRES, _CENTIMETRES) or None in deltas or 0 in deltas:
        return None
    # A direction may be counted down; a list is no number, and raises.
    width, height = (abs(float(delta)) * _MM_PER_CM for delta in deltas)
    return width, height


def _guessed_syntax(dataset: Any) -> Any:
    """Returns the transfer syntax of uncompressed pixels, for a file that names none."""
    from pydicom import uid

    implicit, little = dataset.original_encoding
    if implicit:
        return uid.ImplicitVRLittleEndian
    return uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian


def _in_one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()))


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
    # What matters of odd values is checked where it is used. Anew each time: filters come and go,
    # and the import sets the level.
    warnings.filterwarnings("ignore", module="pydicom")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    return pydicom
