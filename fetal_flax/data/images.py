"""Reading and resizing images: the one preprocessing of training, evaluation and prediction.

An image is grey, uint8, "height width"; a mask is uint8 0/255. The device scales to [0, 1].
"""

import io
import warnings
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import PIL.Image
from jaxtyping import UInt8

from fetal_flax.errors import InputError

MAX_PIXELS = 2**25
"""A file that claims more pixels than this, four 4K frames, is refused before it is decoded."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")
"""Endings of the files that `read_gray` reads, in lower case."""
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")
_EXPECTED = "expected PNG, JPEG, BMP, TIFF, WebP or GIF"
_NO_IMAGE = f"is not an image that can be read: {_EXPECTED}"
_DEPTHS = (8, 10, 12, 14)
"""Bits of devices whose values lie in 16 bits."""
_ORIENTATION = 0x0112  # Of EXIF: how to turn the stored pixels for display.
_UPRIGHT = 1
# Of TIFF: what OpenCV heeds in files of up to 8 bits alone.
_BITS, _PHOTOMETRIC, _PLANES = 258, 262, 284
_WHITE_IS_ZERO, _SEPARATE = 0, 2
# Text that a PNG with an orientation holds; its EXIF may stand behind the pixels.
_PNG_MARKS = (b"eXIf", b"Raw profile type", b"Orientation")


def read_gray(path: Path | str) -> UInt8[np.ndarray, "height width"]:
    """Reads a PNG, JPEG, BMP, TIFF, WebP or GIF file as a grey image, as a viewer shows it.

    Args:
        path: The file. An orientation in its EXIF is applied, 16-bit images are scaled down to 8
            bits (by `significant_bits`), colour is reduced to luma and an alpha channel is dropped.

    Raises:
        InputError: The file is missing, is a directory, can't be read, isn't an image, holds more
            than one or has more than `MAX_PIXELS`.
    """
    path = Path(path)
    check_is_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from None
    try:
        header = _check_header(data)
        if header.kind == "GIF":  # Whether OpenCV reads it depends on how it was built.
            with PIL.Image.open(io.BytesIO(data), formats=[header.kind]) as image:
                return _luma(np.asarray(image.convert("RGB"))[..., ::-1])
        stored = decode_gray(data)
        return _upright(255 - stored if header.is_negative else stored, header.orientation)
    except InputError as error:
        raise InputError(f"{path} {error}") from None
    except (OSError, ValueError, SyntaxError):  # Pillow, of a GIF's pixels.
        raise InputError(f"{path} {_NO_IMAGE}") from None


def check_is_file(path: Path) -> None:
    """Refuses what is no file to read from; a pipe would wait for ever.

    Raises:
        InputError: There is nothing at `path`, or a directory, a pipe, a device.
    """
    if path.is_dir():
        raise InputError(f"{path} is a directory, not an image file")
    if not path.exists():
        raise InputError(f"no such image file: {path}")
    if not path.is_file():
        raise InputError(f"{path} is no regular file: give an image file")


def check_size(height: int, width: int) -> None:
    """Refuses images of more than `MAX_PIXELS`.

    Raises:
        InputError: The image is too large; the message is to follow the file's name.
    """
    if height * width > MAX_PIXELS:
        raise InputError(f"has more than {MAX_PIXELS:,} pixels: crop or shrink it")


def decode_gray(data: bytes) -> UInt8[np.ndarray, "height width"]:
    """Decodes the bytes of an image file as `read_gray` does, without turning it.

    Raises:
        InputError: The bytes are no image; the message is to follow the file's name.
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # No data at all.
        image = None
    if image is None:
        raise InputError(_NO_IMAGE)
    if image.dtype == np.uint16:
        image = _to_8_bits(image)
    if image.dtype != np.uint8:
        raise InputError(f"holds {image.dtype} pixels: expected 8 or 16 bits per channel")
    return _luma(image)


def significant_bits(values: np.ndarray) -> int:
    """Returns how many bits a device took for values that are stored in 16.

    Scanners write 8, 10, 12 or 14 bits into files of 16, whose full scale would leave the image
    black: the least of these that holds the largest value, else 16.
    """
    largest = int(values.max(initial=0))
    return next((bits for bits in _DEPTHS if largest < 2**bits), 16)


def resize_image(
    image: UInt8[np.ndarray, "height width"], size: tuple[int, int]
) -> UInt8[np.ndarray, "new_height new_width"]:
    """Resizes an image to (height, width) bilinearly, as the published training does."""
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)


def resize_mask(
    mask: UInt8[np.ndarray, "height width"], size: tuple[int, int]
) -> UInt8[np.ndarray, "new_height new_width"]:
    """Resizes a mask to (height, width) by nearest neighbour, so that no value is invented.

    INTER_NEAREST_EXACT takes the neighbour of the pixel's centre, on the grid of the bilinear
    image; INTER_NEAREST takes that of its upper left corner, which shifts a mask that is halved
    by half a pixel.
    """
    return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def network_mask(
    mask: UInt8[np.ndarray, "height width"], size: tuple[int, int], *, soft: bool
) -> UInt8[np.ndarray, "new_height new_width"]:
    """Returns a mask at the network's size, as it is trained on.

    Args:
        mask: 255 in the head, 0 outside.
        size: Height and width.
        soft: The setting `data.soft_masks`.

    Returns:
        1 in the head and 0 outside, by nearest neighbour; if `soft`, the share of each pixel that
        the head covers, 0 to 255.
    """
    if soft:
        return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_AREA)
    return (resize_mask(mask, size) > 0).astype(np.uint8)


class _Header(NamedTuple):
    """What is to be known of a file before OpenCV decodes it."""

    kind: str
    """The format."""
    orientation: int
    """Of EXIF, where it is still to be applied."""
    is_negative: bool
    """Whether what will be decoded is white where it is to be black."""


def _check_header(data: bytes) -> _Header:
    """Refuses files that would decode to something huge or else, or that hold several images."""
    if not data:
        raise InputError(f"is empty: {_EXPECTED}")
    width, height, images, orientation = 0, 0, 1, _UPRIGHT
    kind, is_negative, is_mixed_up = "", False, False
    warnings.filterwarnings("ignore", "Corrupt EXIF")  # It turns nothing.
    try:
        # Reads the header and decodes nothing, but a PNG that may have an orientation.
        with PIL.Image.open(io.BytesIO(data), formats=_FORMATS) as header:
            width, height = header.size
            kind = header.format or ""
            check_size(height, width)
            if kind not in ("JPEG", "MPO", "BMP"):
                images = getattr(header, "n_frames", 1)
            # OpenCV turns a TIFF itself.
            if kind != "TIFF" and (kind != "PNG" or any(mark in data for mark in _PNG_MARKS)):
                orientation = _orientation(header)
            tags = getattr(header, "tag_v2", {})  # A TIFF's alone.
            if max(tags.get(_BITS, (1,))) > 8:
                is_negative = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
                is_mixed_up = tags.get(_PLANES) == _SEPARATE
    except InputError:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        check_size(MAX_PIXELS, MAX_PIXELS)
    except Exception:  # Pillow's parsers let many kinds through.
        raise InputError(_NO_IMAGE) from None
    if images > 1:
        raise InputError(f"holds {images} images: save each as a file of its own")
    if is_mixed_up:
        raise InputError("holds each colour by itself, in more than 8 bits: save it as PNG")
    return _Header(kind, orientation, is_negative)


def _orientation(header: PIL.Image.Image) -> int:
    """Returns EXIF's orientation; damaged EXIF turns nothing, as in a viewer."""
    try:
        return header.getexif().get(_ORIENTATION, _UPRIGHT)
    except Exception:  # As many kinds as Pillow's parsers let through.
        return _UPRIGHT


def _upright(
    image: UInt8[np.ndarray, "height width"], orientation: int
) -> UInt8[np.ndarray, "shown_height shown_width"]:
    """Returns stored pixels as EXIF's orientation wants them shown; an unknown one is none."""
    quarter_turns, mirrored = {
        2: (0, True),
        3: (2, False),
        4: (2, True),
        5: (1, True),
        6: (-1, False),
        7: (-1, True),
        8: (1, False),
    }.get(orientation, (0, False))
    turned = np.rot90(image[:, ::-1] if mirrored else image, quarter_turns)
    return np.ascontiguousarray(turned)


def _to_8_bits(image: np.ndarray) -> np.ndarray:
    """Returns a 16-bit image in 8, by the bits that it uses."""
    bits = significant_bits(image)
    if bits == 16:
        return (image // 257).astype(np.uint8)  # 65535 is 255 * 257.
    full = 2**bits - 1
    return ((image.astype(np.uint32) * 255 + full // 2) // full).astype(np.uint8)


def _luma(image: np.ndarray) -> UInt8[np.ndarray, "height width"]:
    """Returns OpenCV's "height width", BGR or BGRA image as grey."""
    if image.ndim == 2:
        return image
    if image.shape[-1] == 1:
        return image[..., 0]
    if image.shape[-1] not in (3, 4):
        raise InputError(f"has {image.shape[-1]} channels: expected grey, RGB or RGBA")
    return cv2.cvtColor(np.ascontiguousarray(image[..., :3]), cv2.COLOR_BGR2GRAY)
