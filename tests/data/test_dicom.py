import builtins
import logging
from pathlib import Path

import numpy as np
import pydicom.data
import pydicom.filebase
import pydicom.filewriter
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, UltrasoundImageStorage

from fetal_flax.data import dicom
from fetal_flax.data.dicom import DicomFile
from fetal_flax.errors import InputError

BUNDLED = Path(pydicom.data.__file__).parent / "test_files"
GRAY = np.add.outer(np.arange(40), 3 * np.arange(60)).astype(np.uint8)


def region(delta_x=0.02, delta_y=0.02, *, units=3, spatial=1, tissue=1) -> Dataset:
    found = Dataset()
    found.RegionSpatialFormat, found.RegionDataType = spatial, tissue
    found.PhysicalUnitsXDirection = found.PhysicalUnitsYDirection = units
    found.PhysicalDeltaX, found.PhysicalDeltaY = delta_x, delta_y
    return found


def write(
    path: Path, pixels: np.ndarray = GRAY, *, frames: int | None = None, **attributes
) -> Path:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = UltrasoundImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    dataset.SOPClassUID, dataset.SOPInstanceUID = UltrasoundImageStorage, UID("1.2.3")
    colour = pixels.shape[-1] == 3
    dataset.Rows, dataset.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    dataset.SamplesPerPixel = 3 if colour else 1
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.PixelRepresentation = 0
    if frames:
        dataset.NumberOfFrames = frames
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


def only_frame(path: Path) -> np.ndarray:
    (frame,) = DicomFile(path).frames()
    assert frame.dtype == np.uint8
    return frame


def test_gray_pixels_come_as_they_are(tmp_path):
    np.testing.assert_array_equal(only_frame(write(tmp_path / "a.dcm")), GRAY)


def test_monochrome1_is_turned(tmp_path):
    path = write(tmp_path / "a.dcm", PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(only_frame(path), 255 - GRAY)


def test_twelve_bits_are_scaled_by_what_is_stored(tmp_path):
    deep = np.array([[0, 2048, 4095, 16]], np.uint16)
    path = write(tmp_path / "a.dcm", deep, BitsStored=12)
    assert only_frame(path).tolist() == [[0, 128, 255, 1]]


def test_a_window_is_applied(tmp_path):
    path = write(tmp_path / "a.dcm", np.array([[0, 90, 110, 255]], np.uint8))
    window = dict(WindowCenter=100, WindowWidth=21)
    path = write(tmp_path / "b.dcm", np.array([[0, 90, 100, 110, 255]], np.uint8), **window)
    low, dark, middle, bright, high = only_frame(path)[0].tolist()
    assert (low, high) == (0, 255) and dark <= 13 and abs(middle - 128) <= 7 and bright >= 242


def test_colour_becomes_luma(tmp_path):
    colours = np.zeros((1, 3, 3), np.uint8)
    colours[0, [0, 1, 2], [0, 1, 2]] = 255
    np.testing.assert_allclose(
        only_frame(write(tmp_path / "a.dcm", colours)), [[76, 150, 29]], atol=1
    )


def test_frames_come_one_by_one(tmp_path):
    pixels = np.stack([GRAY, GRAY[::-1], GRAY // 2])
    file = DicomFile(write(tmp_path / "a.dcm", pixels, frames=3))
    assert file.frame_count == 3
    for frame, expected in zip(file.frames(), pixels, strict=True):
        np.testing.assert_array_equal(frame, expected)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, None),
        ({"PixelSpacing": [0.25, 0.25]}, 0.25),
        ({"SequenceOfUltrasoundRegions": [region()]}, 0.2),
        # The region's calibration is the ultrasound's own.
        ({"SequenceOfUltrasoundRegions": [region()], "PixelSpacing": [0.25, 0.25]}, 0.2),
        ({"SequenceOfUltrasoundRegions": [region(-0.02, 0.02)]}, 0.2),
        ({"SequenceOfUltrasoundRegions": [region(), region()]}, 0.2),
        # A spectrum beside the image, and one whose axis is time.
        ({"SequenceOfUltrasoundRegions": [region(0.5, 0.5, spatial=3, tissue=3), region()]}, 0.2),
        ({"SequenceOfUltrasoundRegions": [region(units=4)]}, None),
        ({"SequenceOfUltrasoundRegions": [region(0.0, 0.0)]}, None),
        ({"SequenceOfUltrasoundRegions": [region(), region(0.02 + 1e-9)]}, 0.2),
        ({"PixelAspectRatio": [3, 3]}, None),
        ({"PixelAspectRatio": [2, 1], "PixelSpacing": [0.25, 0.25]}, 0.25),
    ],
)
def test_pixel_sizes_are_those_of_the_tissue_region(tmp_path, attributes, expected):
    assert DicomFile(write(tmp_path / "a.dcm", **attributes)).pixel_size_mm == (
        None if expected is None else pytest.approx(expected)
    )


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"PixelSpacing": [0.2, 0.1]}, r"a\.dcm has pixels of 0\.1 × 0\.2 mm: resample"),
        (
            {"SequenceOfUltrasoundRegions": [region(), region(0.03, 0.03)]},
            r"a\.dcm has regions of different pixel sizes.*--pixel-size-csv",
        ),
        ({"PixelAspectRatio": [2, 1]}, r"a\.dcm has pixels that are 2 high and 1 wide: resample"),
        ({"PixelAspectRatio": [2, 1, 1]}, r"a\.dcm has a pixel size that can't be read"),
    ],
)
def test_pixel_sizes_that_are_no_single_one_are_refused(tmp_path, attributes, message):
    file = DicomFile(write(tmp_path / "a.dcm", **attributes))
    with pytest.raises(InputError, match=message):
        _ = file.pixel_size_mm


@pytest.mark.parametrize(
    ("name", "frames", "shape", "size"),
    [
        ("examples_palette.dcm", 1, (350, 800), 0.2622878766),
        ("examples_ybr_color.dcm", 30, (240, 320), 0.5104970559),
        ("examples_rgb_color.dcm", 1, (240, 320), None),
    ],
)
def test_ultrasound_that_pydicom_ships(name, frames, shape, size):
    file = DicomFile(BUNDLED / name)
    images = list(file.frames())
    assert dicom.is_dicom(BUNDLED / name)
    assert len(images) == file.frame_count == frames
    assert all(image.shape == shape and image.dtype == np.uint8 for image in images)
    assert all(np.ptp(image) > 100 for image in images)
    assert file.pixel_size_mm == (None if size is None else pytest.approx(size))


def _raw_spacing(path: Path, text: str, *, kind: bytes = b"DS") -> Path:
    """Writes a file whose PixelSpacing is any text, as pydicom wouldn't."""
    content = write(path, PixelSpacing=[0.11111111, 0.22222222]).read_bytes()
    old = b"0.11111111\\0.22222222"
    new = text.encode().ljust(len(old))
    assert len(new) == len(old) and b"DS\x16\0" + old.ljust(22) in content
    path.write_bytes(content.replace(b"DS\x16\0" + old.ljust(22), kind + b"\x16\0" + new.ljust(22)))
    return path


@pytest.mark.parametrize("kind", [b"DS", b"LO", b"CS"])
@pytest.mark.parametrize(
    "text",
    [
        *("0.1", "0,1\\0,1", "0.1 mm\\0.1 mm", "0.1\\", "\\0.1", "wide\\wide", "0.1\\0.1\\0.1"),
        *("nan\\nan", "inf\\inf", "-0.1\\-0.1", "0\\0", "1e300\\1e300", "1000\\1000", "0.1\\nan"),
    ],
)
def test_a_spacing_that_is_none_is_one_sentence(tmp_path, text, kind):
    file = DicomFile(_raw_spacing(tmp_path / "a.dcm", text, kind=kind))
    with pytest.raises(InputError, match=r"a\.dcm has .*give the size as --pixel-size") as error:
        _ = file.pixel_size_mm
    assert str(error.value).isprintable()


@pytest.mark.parametrize("deltas", [(float("nan"),) * 2, (float("inf"),) * 2, ([0.02, 0.02],) * 2])
def test_a_region_whose_size_is_none_is_one_sentence(tmp_path, deltas):
    file = DicomFile(write(tmp_path / "a.dcm", SequenceOfUltrasoundRegions=[region(*deltas)]))
    with pytest.raises(InputError, match=r"a\.dcm has .*give the size as --pixel-size"):
        _ = file.pixel_size_mm


def test_values_of_fewer_bits_than_are_stored_are_scaled_by_what_is_held(tmp_path):
    gray = GRAY.copy()
    gray[0, 0] = 255
    deep = gray.astype(np.uint16)
    np.testing.assert_array_equal(only_frame(write(tmp_path / "a.dcm", deep)), gray)
    path = write(tmp_path / "b.dcm", deep << 4)
    np.testing.assert_allclose(only_frame(path), gray, atol=1)
    # A window says what is shown, whatever is held.
    windowed = write(tmp_path / "c.dcm", deep, WindowCenter=128, WindowWidth=256)
    np.testing.assert_allclose(only_frame(windowed), gray, atol=1)


@pytest.mark.parametrize(
    ("values", "attributes"),
    [
        # Signed numbers that are never negative, in as many bits as there are.
        (GRAY.astype(np.int16), {"PixelRepresentation": 1}),
        (GRAY.astype(np.int16) * 16, {"PixelRepresentation": 1}),
        (GRAY.astype(np.int16) * 128, {"PixelRepresentation": 1}),
        (GRAY.astype(np.int16) * 8, {"PixelRepresentation": 1, "BitsStored": 12}),
        # A slope that goes down, with a window and without.
        (255 - GRAY, {"RescaleSlope": -1, "RescaleIntercept": 255}),
        (4095 - GRAY.astype(np.uint16) * 16, {"RescaleSlope": -1, "RescaleIntercept": 4095}),
        (
            255 - GRAY,
            {
                **{"RescaleSlope": -1, "RescaleIntercept": 255},
                **{"WindowCenter": 128, "WindowWidth": 256},
            },
        ),
        # A window around zero is one, too.
        (
            GRAY.astype(np.int16) - 128,
            {"PixelRepresentation": 1, "WindowCenter": 0, "WindowWidth": 256},
        ),
        (
            GRAY.astype(np.uint16),
            {
                **{"RescaleSlope": 1, "RescaleIntercept": -128},
                **{"WindowCenter": 0, "WindowWidth": 256},
            },
        ),
        # One without a width is none.
        (GRAY.astype(np.uint16) * 16, {"WindowCenter": 100}),
    ],
)
def test_however_values_are_told_they_are_shown_alike(tmp_path, values, attributes):
    shown = only_frame(write(tmp_path / "a.dcm", values, **attributes))
    np.testing.assert_allclose(shown, GRAY, atol=1)


@pytest.mark.parametrize("bits", [12, 16])
def test_a_table_is_shown_by_its_own_bits(tmp_path, bits):
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [4096, 0, bits])
    shown = np.arange(4096) * ((2**bits - 1) / 4095)
    table.add_new("LUTData", "OW", shown.round().astype(np.uint16).tobytes())
    deep = GRAY.astype(np.uint16) * 16
    path = write(tmp_path / "a.dcm", deep, BitsStored=12, VOILUTSequence=[table])
    np.testing.assert_allclose(only_frame(path), GRAY, atol=1)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("is_rising", [True, False])
def test_a_window_over_a_table_is_shown_by_the_table_s_bits(tmp_path, bits, is_rising):
    highest = 2**bits - 1
    shown = np.linspace(0, highest, 256).round().astype(np.uint16)
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [256, 0, bits])
    table.add_new("LUTData", "OW", (shown if is_rising else shown[::-1]).tobytes())
    path = write(
        tmp_path / "a.dcm",
        GRAY if is_rising else 255 - GRAY,
        ModalityLUTSequence=[table],
        WindowCenter=2 ** (bits - 1),
        WindowWidth=2**bits,
    )
    np.testing.assert_allclose(only_frame(path), GRAY, atol=1)


@pytest.mark.filterwarnings("ignore:Invalid value for VR DS")  # It is written all the same.
@pytest.mark.parametrize(
    "attributes",
    [
        {"RescaleSlope": 0, "RescaleIntercept": 0},
        {"RescaleSlope": "nan", "RescaleIntercept": 0},
        {"WindowCenter": "nan", "WindowWidth": 100},
        {"WindowCenter": 100, "WindowWidth": "nan"},
    ],
)
def test_a_slope_or_window_that_is_none_is_refused(tmp_path, attributes):
    path = write(tmp_path / "a.dcm", **attributes)
    with pytest.raises(InputError, match=r"a\.dcm has pixels that can't be decoded \(its slope or"):
        list(DicomFile(path).frames())


def test_values_in_the_upper_bits_are_refused(tmp_path):
    path = write(tmp_path / "a.dcm", GRAY.astype(np.uint16) * 256, BitsStored=12)
    dataset = pydicom.dcmread(path)
    dataset.HighBit = 15
    dataset.save_as(path)
    with pytest.raises(InputError, match="its values end at bit 15 of 12"):
        list(DicomFile(path).frames())


def test_pydicom_has_nothing_to_say_of_odd_files(tmp_path, caplog):
    logging.getLogger("pydicom").setLevel(logging.WARNING)  # As its import does.
    assert only_frame(write(tmp_path / "a.dcm", NumberOfFrames=0)).shape == GRAY.shape
    assert only_frame(write(tmp_path / "b.dcm", np.stack([GRAY] * 2))).shape == GRAY.shape
    assert not caplog.records


def test_as_many_frames_come_as_are_told(tmp_path):
    assert only_frame(write(tmp_path / "a.dcm", np.stack([GRAY] * 2))).shape == GRAY.shape
    with pytest.raises(InputError, match="it has -1 frames"):
        DicomFile(write(tmp_path / "b.dcm", frames=-1))


def test_a_file_without_a_preamble_is_read(tmp_path):
    whole = write(tmp_path / "a.dcm", SequenceOfUltrasoundRegions=[region()])
    dataset = pydicom.dcmread(whole)
    for implicit in (True, False):
        bare = tmp_path / f"bare{implicit}.dcm"
        with bare.open("wb") as stream:
            file = pydicom.filebase.DicomFileLike(stream)
            file.is_little_endian, file.is_implicit_VR = True, implicit
            pydicom.filewriter.write_dataset(file, dataset)
        assert not dicom.is_dicom(bare)
        np.testing.assert_array_equal(only_frame(bare), GRAY)
        assert DicomFile(bare).pixel_size_mm == pytest.approx(0.2)


def write_report(path: Path, kind: str = "1.2.840.10008.5.1.4.1.1.88.33") -> Path:
    """A file without an image: a structured report, or a directory."""
    dataset = pydicom.dcmread(write(path))
    del dataset.PixelData, dataset.Rows, dataset.Columns
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = UID(kind)
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize(
    ("uid", "kind"),
    [
        ("1.2.840.10008.5.1.4.1.1.88.33", "DICOM structured report"),
        ("1.2.840.10008.1.3.10", "DICOM directory file"),
        ("1.2.840.10008.5.1.4.1.1.9.1.1", "DICOM file without an image"),
    ],
)
def test_files_without_an_image_say_what_they_are(tmp_path, uid, kind):
    with pytest.raises(dicom.NoImageError, match=rf"holds no image: it is a {kind}$") as error:
        DicomFile(write_report(tmp_path / "a", uid))
    assert error.value.kind == kind


def test_a_kind_of_value_that_pydicom_does_not_know_is_no_traceback(tmp_path):
    """As the fuzz campaign found it, in what says of which kind the file is."""
    path = write_report(tmp_path / "a.dcm")
    content = path.read_bytes()
    tag = b"\2\0\2\0UI"
    assert content.count(tag) == 1
    path.write_bytes(content.replace(tag, b"\2\0\2\0U\1"))
    with pytest.raises(InputError, match=r"a\.dcm"):
        DicomFile(path)


def test_bad_files_are_named(tmp_path):
    text, cut = tmp_path / "text.dcm", tmp_path / "cut.dcm"
    text.write_text("no image")
    whole = write(tmp_path / "a.dcm").read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    huge = write(tmp_path / "huge.dcm", Rows=20_000, Columns=20_000)
    with pytest.raises(InputError, match=r"text\.dcm is no DICOM image that can be read"):
        DicomFile(text)
    with pytest.raises(InputError, match=r"cut\.dcm"):
        list(DicomFile(cut).frames())
    with pytest.raises(InputError, match=r"huge\.dcm has more than 33,554,432 pixels"):
        DicomFile(huge)
    assert not dicom.is_dicom(text) and not dicom.is_dicom(tmp_path)
    assert not dicom.is_dicom(tmp_path / "missing")


def test_without_pydicom_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.dcm")
    imports = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("pydicom"):
            raise ModuleNotFoundError(name=name)
        return imports(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'fetal_flax\[dicom\]'"):
        DicomFile(path)
