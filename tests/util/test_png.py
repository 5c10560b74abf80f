import io
import struct
import zlib

import cv2
import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import PIL.Image
import pytest

from fetal_flax._util.png import encode_png

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
SHAPES |= SHAPES.map(lambda shape: (*shape, 3))


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(arrays.arrays(np.uint8, SHAPES))
def test_opencv_and_pillow_read_the_same_pixels(pixels):
    png = encode_png(pixels)
    read = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    assert read is not None
    np.testing.assert_array_equal(read if pixels.ndim == 2 else read[..., ::-1], pixels)
    with PIL.Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        assert image.mode == ("L" if pixels.ndim == 2 else "RGB")
        np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("shape", [(540, 800), (540, 800, 3)])
def test_a_scan_is_smaller_and_every_checksum_holds(shape):
    rng = np.random.default_rng(0)
    pixels = cv2.GaussianBlur(rng.integers(0, 256, shape, np.uint8), (0, 0), 4)
    png = encode_png(pixels)
    assert len(png) < 0.6 * pixels.nbytes
    at, kinds = 8, []
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        chunk = png[at + 4 : at + 8 + length]
        assert struct.unpack_from(">I", png, at + 8 + length) == (zlib.crc32(chunk),)
        kinds.append(chunk[:4])
        at += 12 + length
    assert kinds == [b"IHDR", b"IDAT", b"IEND"] and at == len(png)
    # Whoever checks it, as zlib's own inflate does, finds Adler-32 right.
    (length,) = struct.unpack_from(">I", png, 33)
    assert len(zlib.decompress(png[41 : 41 + length])) == pixels.nbytes + shape[0]


def test_rows_that_are_not_contiguous_are_encoded_as_they_look():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)[::-2, ::2]
    read = cv2.imdecode(np.frombuffer(encode_png(pixels), np.uint8), cv2.IMREAD_UNCHANGED)
    assert read is not None
    np.testing.assert_array_equal(read[..., ::-1], pixels)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 5, 2), np.uint8),
        np.zeros((4, 5, 3, 1), np.uint8),
        np.zeros((0, 5), np.uint8),
        np.zeros((4, 5), np.uint16),
        np.zeros((4, 5), bool),
    ],
    ids=["two-channels", "four-axes", "empty", "16-bit", "mask"],
)
def test_what_is_no_grey_or_rgb_image_is_refused(pixels):
    with pytest.raises(ValueError, match=r"uint8, grey or RGB"):
        encode_png(pixels)
