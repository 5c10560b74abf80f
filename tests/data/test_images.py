import io
import struct
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from fetal_flax._util.png import encode_png
from fetal_flax.data import images
from fetal_flax.errors import InputError


def _gradient(height: int = 40, width: int = 60) -> np.ndarray:
    return np.add.outer(np.arange(height), 3 * np.arange(width)).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff"])
def test_reads_lossless_formats_exactly(tmp_path: Path, suffix: str):
    path = tmp_path / f"Bild ä.{suffix}"
    path.write_bytes(cv2.imencode(f".{suffix}", _gradient())[1].tobytes())
    np.testing.assert_array_equal(images.read_gray(path), _gradient())


def test_reads_jpeg(tmp_path: Path):
    path = tmp_path / "image.jpg"
    smooth = _gradient(30, 60)
    cv2.imwrite(str(path), smooth)
    difference = images.read_gray(path).astype(int) - smooth
    assert np.abs(difference).mean() < 5


def test_16_bits_are_scaled_not_cut(tmp_path: Path):
    deep = np.array([[0, 256, 257, 32896, 65535]], np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    assert images.read_gray(tmp_path / "deep.png").tolist() == [[0, 0, 1, 128, 255]]


@pytest.mark.parametrize("alpha", [False, True])
def test_colour_becomes_luma(tmp_path: Path, alpha: bool):
    colours = np.zeros((1, 3, 4 if alpha else 3), np.uint8)
    colours[0, [0, 1, 2], [2, 1, 0]] = 255  # OpenCV's order: red, green, blue.
    cv2.imwrite(str(tmp_path / "colour.png"), colours)
    gray = images.read_gray(tmp_path / "colour.png")
    assert gray.shape == (1, 3)
    np.testing.assert_allclose(gray, [[76, 150, 29]], atol=1)


def _write(path: Path, kind: str) -> None:
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("no image")
    elif kind == "cut":
        path.write_bytes(encode_png(_gradient())[:20])
    elif kind == "float":
        path.write_bytes(cv2.imencode(".tiff", _gradient().astype(np.float32))[1].tobytes())


@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "text", "cut", "float"])
def test_bad_files_are_named(tmp_path: Path, kind: str):
    path = tmp_path / "scan.png"
    _write(path, kind)
    with pytest.raises(InputError, match=r"scan\.png"):
        images.read_gray(path)


def test_encode_decode_is_exact():
    noise = np.random.default_rng(0).integers(0, 256, (33, 47), np.uint8)
    np.testing.assert_array_equal(images.decode_gray(encode_png(noise)), noise)


def test_sizes_are_height_and_width():
    assert images.resize_image(_gradient(), (16, 24)).shape == (16, 24)
    assert images.resize_mask(_gradient(), (16, 24)).shape == (16, 24)


def test_resized_mask_stays_on_the_image_grid():
    mask = np.zeros((540, 800), np.uint8)
    mask[100:301, 200:503] = 255
    small = images.resize_mask(mask, (256, 256))
    assert set(np.unique(small)) == {0, 255}
    bilinear = images.resize_image(mask, (256, 256)).astype(float)
    for axis in (0, 1):
        positions = np.arange(256)
        centers = [
            (weights.sum(axis=axis) * positions).sum() / weights.sum()
            for weights in (small.astype(float), bilinear)
        ]
        # INTER_NEAREST is off by 0.3 pixels here.
        assert abs(centers[0] - centers[1]) < 0.2


def test_halving_a_mask_is_symmetric():
    mask = np.zeros((1, 12), np.uint8)
    mask[0, 3:9] = 255
    small = images.resize_mask(mask, (1, 4))
    np.testing.assert_array_equal(small, small[:, ::-1])


def _encoded(pixels: np.ndarray, kind: str, orientation: int | None = None) -> bytes:
    file, exif = io.BytesIO(), PIL.Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(kind, {})
    if kind == "TIFF":
        PIL.Image.fromarray(pixels).save(file, kind, exif=exif)
    else:
        PIL.Image.fromarray(pixels).save(file, kind, exif=exif.tobytes(), **lossless)
    return file.getvalue()


@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 99])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_an_exif_orientation_is_applied_in_every_format(tmp_path: Path, kind, orientation):
    data = _encoded(_gradient(), kind, orientation)
    path = tmp_path / f"turned.{kind.lower()}"
    path.write_bytes(data)
    # Pillow turns some kinds when they are opened, others when it is asked to.
    with PIL.Image.open(io.BytesIO(_encoded(_gradient(), "PNG", orientation))) as image:
        shown = np.asarray(PIL.ImageOps.exif_transpose(image).convert("L"))
    assert (orientation in (5, 6, 7, 8)) == (shown.shape != _gradient().shape)
    np.testing.assert_allclose(images.read_gray(path), shown, atol=3)


def test_an_orientation_behind_the_pixels_of_a_png_is_applied(tmp_path: Path):
    data = _encoded(_gradient(), "PNG", 6)
    at = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[at : at + 4], "big")
    chunk, rest = data[at : at + length], data[:at] + data[at + length :]
    (tmp_path / "a.png").write_bytes(rest[:-12] + chunk + rest[-12:])  # Before IEND.
    expected = np.rot90(_gradient(), -1)
    np.testing.assert_array_equal(images.read_gray(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_values_of_fewer_bits_in_16_are_scaled_by_what_is_held(tmp_path: Path, bits, suffix):
    gray = _gradient()
    gray[0, 0] = 255
    path = tmp_path / f"deep.{suffix}"
    cv2.imwrite(str(path), np.round(gray * ((2**bits - 1) / 255)).astype(np.uint16))
    np.testing.assert_allclose(images.read_gray(path), gray, atol=1)
    shifted = gray.astype(np.uint16) << (bits - 8)
    cv2.imwrite(str(path), shifted)
    np.testing.assert_allclose(images.read_gray(path), gray, atol=1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("exif", [b"x" * 30, b"II*\0\x08\0\0\0\xff\xff", b""])
def test_damaged_exif_turns_nothing(tmp_path: Path, kind, exif, recwarn):
    path = tmp_path / f"a.{kind.lower()}"
    image = PIL.Image.fromarray(_gradient()).convert("RGB")
    image.save(path, kind, exif=b"Exif\0\0" + exif, lossless=True, quality=100)
    np.testing.assert_allclose(images.read_gray(path), _gradient(), atol=3)
    assert not recwarn


def _tiff(pixels: np.ndarray, **tags: int) -> bytes:
    """An uncompressed little-endian TIFF of one strip for each plane: (planes, height, width)."""
    planes, height, width = pixels.shape
    size = height * width * pixels.itemsize
    places = {"photometric": 262, "orientation": 274, "planes": 284}
    entries = {256: [width], 257: [height], 258: [8 * pixels.itemsize] * planes, 259: [1]}
    entries |= {262: [1], 273: [8 + i * size for i in range(planes)], 277: [planes]}
    entries |= {278: [height], 279: [size] * planes}
    entries |= {places[name]: [value] for name, value in tags.items()}
    start = 8 + pixels.nbytes
    extra_at, directory, extra = start + 2 + 12 * len(entries) + 4, b"", b""
    for tag, values in sorted(entries.items()):
        data = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            data, extra = struct.pack("<I", extra_at + len(extra)), extra + data
        directory += struct.pack("<HHI", tag, 4, len(values)) + data
    head = b"II*\0" + struct.pack("<I", start) + pixels.tobytes()
    return head + struct.pack("<H", len(entries)) + directory + bytes(4) + extra


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_tiff_whose_zero_is_white_is_turned(tmp_path: Path, bits, orientation):
    gray = _gradient()
    gray[0, 0], gray[0, 1] = 0, 255
    kind = np.uint8 if bits == 8 else np.uint16
    stored = np.round((255 - gray.astype(float)) * ((2**bits - 1) / 255)).astype(kind)
    path = tmp_path / "a.tif"
    path.write_bytes(_tiff(stored[None], photometric=0, orientation=orientation))
    shown = np.rot90(gray, -1) if orientation == 6 else gray
    np.testing.assert_allclose(images.read_gray(path), shown, atol=1)


def test_colours_in_planes_are_read_or_refused(tmp_path: Path):
    path = tmp_path / "a.tif"
    path.write_bytes(_tiff(np.stack([_gradient()] * 3), photometric=2, planes=2))
    np.testing.assert_allclose(images.read_gray(path), _gradient(), atol=1)
    deep = np.stack([_gradient().astype(np.uint16) * 257] * 3)
    path.write_bytes(_tiff(deep, photometric=2, planes=2))
    with pytest.raises(InputError, match=r"a\.tif holds each colour by itself.*: save it as PNG"):
        images.read_gray(path)


@pytest.mark.parametrize("kind", ["WEBP", "GIF"])
def test_webp_and_gif_are_read(tmp_path: Path, kind):
    path = tmp_path / f"scan.{kind.lower()}"
    path.write_bytes(_encoded(_gradient(), kind))
    np.testing.assert_array_equal(images.read_gray(path), _gradient())
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    with pytest.raises(InputError, match=r"scan\.\w+ is not an image that can be read"):
        images.read_gray(path)
    pages = [PIL.Image.fromarray(_gradient()), PIL.Image.fromarray(_gradient()[::-1].copy())]
    pages[0].save(path, kind, save_all=True, append_images=pages[1:])
    with pytest.raises(InputError, match="holds 2 images"):
        images.read_gray(path)
