"""Single images, as the Python interface reads them; test_predict.py has folders."""

from pathlib import Path

import numpy as np
import pydicom.data
import pytest

from fetal_flax.data.dicom import DicomFile
from fetal_flax.errors import InputError
from fetal_flax.inference.sources import read_image

DICOM = Path(pydicom.data.__file__).parent / "test_files"


def test_a_dicom_file_tells_its_pixel_size():
    path = DICOM / "examples_palette.dcm"
    file = DicomFile(path)
    image, pixel_size_mm = read_image(path)
    assert pixel_size_mm == file.pixel_size_mm is not None
    assert np.array_equal(image, next(file.frames()))


def test_of_several_frames_one_must_be_named():
    path = DICOM / "examples_ybr_color.dcm"
    frames = list(DicomFile(path).frames())
    assert len(frames) > 2 and not np.array_equal(frames[0], frames[2])
    with pytest.raises(InputError, match=r"holds several frames: name one, such as frame=0"):
        read_image(path)
    assert np.array_equal(read_image(path, frame=2)[0], frames[2])
    with pytest.raises(InputError, match=f"has no frame {len(frames)}"):
        read_image(path, frame=len(frames))
