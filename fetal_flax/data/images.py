"""Reading and resizing images: the one preprocessing of training, evaluation and prediction.

An image is grey, uint8, "height width"; a mask is uint8 0/255. The device scales to [0, 1].
"""

from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from fetal_flax.errors import InputError


def read_gray(path: Path | str) -> UInt8[np.ndarray, "height width"]:
    """Reads a PNG, JPEG, BMP or TIFF file as a grey image.

    Args:
        path: The file. 16-bit images are scaled down to 8 bits, colour is reduced to luma and
            an alpha channel is dropped.

    Raises:
        InputError: The file is missing, is a directory, can't be read or isn't an image.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a directory, not an image file")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"no such image file: {path}") from None
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from None
    try:
        return decode_gray(data)
    except InputError as error:
        raise InputError(f"{path} {error}") from None


def decode_gray(data: bytes) -> UInt8[np.ndarray, "height width"]:
    """Decodes the bytes of an image file as `read_gray` does.

    Raises:
        InputError: The bytes are no image; the message is to follow the file's name.
    """
    if not data:
        raise InputError("is empty: expected a PNG, JPEG, BMP or TIFF image")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        image = None
    if image is None:
        raise InputError("is not an image that can be read: expected PNG, JPEG, BMP or TIFF")
    if image.dtype == np.uint16:
        image = (image // 257).astype(np.uint8)  # 65535 is 255 * 257.
    if image.dtype != np.uint8:
        raise InputError(f"holds {image.dtype} pixels: expected 8 or 16 bits per channel")
    return _luma(image)


def encode_png(image: UInt8[np.ndarray, "height width"]) -> bytes:
    """Encodes a grey image as PNG, without loss."""
    return cv2.imencode(".png", image)[1].tobytes()


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


def _luma(image: np.ndarray) -> UInt8[np.ndarray, "height width"]:
    """Returns OpenCV's "height width", BGR or BGRA image as grey."""
    if image.ndim == 2:
        return image
    if image.shape[-1] == 1:
        return image[..., 0]
    if image.shape[-1] not in (3, 4):
        raise InputError(f"has {image.shape[-1]} channels: expected grey, RGB or RGBA")
    return cv2.cvtColor(np.ascontiguousarray(image[..., :3]), cv2.COLOR_BGR2GRAY)
