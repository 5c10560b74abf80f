"""What docs/deploy.md puts around an exported file measures what we measure."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest

import fetal_flax as ff
from fetal_flax.measurement.head import OUTLINE_PX

DOCS = Path(__file__).resolve().parents[2] / "docs" / "deploy.md"

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_the_python_lines_measure_as_we_do(threshold_network, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    image = np.full((180, 240), 20, np.uint8)
    cv2.ellipse(image, ((120.0, 90.0), (130.0, 98.0), 20), 230, -1)
    cv2.ellipse(image, ((120.0, 90.0), (20.0, 10.0), 20), 20, -1)  # A hole.
    cv2.rectangle(image, (5, 5), (15, 15), 230, -1)  # A smaller region.
    cv2.imwrite(str(tmp_path / "scan.png"), image)
    ff.export.to_file(threshold_network, tmp_path / "network.onnx", images=1)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(code, found)
    expected = ff.Segmenter(threshold_network).measure(image)
    assert expected.head is not None and expected.head.components == 2
    assert (found["mask"] == expected.mask).all()
    ellipse = expected.head.ellipse
    assert found["circumference"] == pytest.approx(ellipse.circumference, abs=1e-3)
    assert sorted((found["a"], found["b"])) == pytest.approx(
        [ellipse.semi_minor, ellipse.semi_major], abs=1e-3
    )
    assert float(found["said"]["outline_px"]) == OUTLINE_PX["hc18"]
