"""What docs/deploy.md puts around an exported file measures what we measure."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import onnxruntime
import pytest

import fetal_flax as ff
from fetal_flax.export.web import BrowserRuntime
from fetal_flax.measurement.ellipse import Ellipse
from fetal_flax.measurement.head import OUTLINE_PX

DOCS = Path(__file__).resolve().parents[2] / "docs" / "deploy.md"
HEADER = "onnxruntime_cxx_api.h"

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Scan(NamedTuple):
    """scan.png, beside network.onnx for images that are wider than high."""

    image: np.ndarray
    mask: np.ndarray
    """As we segment it."""
    ellipse: Ellipse
    """As we measure it."""


@pytest.fixture
def scan(threshold_network, tmp_path, monkeypatch) -> Scan:
    image = np.full((180, 240), 20, np.uint8)
    cv2.ellipse(image, ((120.0, 90.0), (130.0, 98.0), 20), 230, -1)
    cv2.ellipse(image, ((120.0, 90.0), (20.0, 10.0), 20), 20, -1)  # A hole.
    cv2.rectangle(image, (5, 5), (15, 15), 230, -1)  # A smaller region.
    cv2.imwrite(str(tmp_path / "scan.png"), image)
    ff.export.to_file(threshold_network, tmp_path / "network.onnx", images=1)
    monkeypatch.chdir(tmp_path)
    expected = ff.Segmenter(threshold_network).measure(image)
    assert expected.head is not None and expected.head.components == 2
    return Scan(image, expected.mask, expected.head.ellipse)


def lines(language: str) -> str:
    (code,) = re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), re.DOTALL)
    return code


def test_the_python_lines_measure_as_we_do(scan):
    found: dict = {}
    exec(lines("python"), found)
    assert (found["mask"] == scan.mask).all()
    assert found["circumference"] == pytest.approx(scan.ellipse.circumference, abs=1e-3)
    assert sorted((found["a"], found["b"])) == pytest.approx(
        [scan.ellipse.semi_minor, scan.ellipse.semi_major], abs=1e-3
    )
    assert float(found["said"]["outline_px"]) == OUTLINE_PX["hc18"]


# It runs where a browser would: the files that it would fetch are read, and the mask is written.
IN_NODE = """
import { readFileSync, writeFileSync } from "node:fs";
import * as ort from "./onnxruntime.mjs";
globalThis.fetch = async (name) => new Response(readFileSync(name));
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmBinary = readFileSync("onnxruntime.wasm").buffer;
const [width, height] = process.argv.slice(2).map(Number);
const grey = readFileSync("grey.bin");
LINES
writeFileSync("logits.bin", logits.data);
writeFileSync("mask.bin", Uint8Array.from(mask));
"""


@pytest.mark.slow
def test_the_javascript_lines_segment_as_we_do(
    scan: Scan, program: Callable[..., str], onnxruntime_web: BrowserRuntime
):
    Path("onnxruntime.mjs").write_bytes(onnxruntime_web.library)
    Path("onnxruntime.wasm").write_bytes(onnxruntime_web.wasm)
    Path("lines.mjs").write_text(IN_NODE.replace("LINES", lines("javascript")))
    scan.image.tofile("grey.bin")
    height, width = scan.image.shape
    command = [program("node"), "lines.mjs", str(width), str(height)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    mask = np.fromfile("mask.bin", np.uint8).reshape(height, width)
    np.testing.assert_array_equal(mask, scan.mask)
    session = onnxruntime.InferenceSession("network.onnx")
    small = cv2.resize(scan.image, (96, 64)).astype(np.float32) / 255
    (logits,) = session.run(["logits"], {"image": small[None, None]})
    found = np.fromfile("logits.bin", np.float32)
    np.testing.assert_allclose(found, np.asarray(logits).ravel(), atol=1e-4)


@pytest.mark.slow
def test_the_c_plus_plus_lines_measure_as_we_do(scan: Scan, tmp_path: Path):
    options = cpp_options(tmp_path)
    Path("lines.cpp").write_text(lines("cpp"))
    strict = ("-std=c++17", "-Wall", "-Wextra", "-Werror")
    ran = subprocess.run(
        ["g++", *strict, "lines.cpp", "-o", "lines", *options], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    ran = subprocess.run([tmp_path / "lines"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    circumference, unit = ran.stdout.split()
    assert unit == "pixels"
    # It prints six digits.
    assert float(circumference) == pytest.approx(scan.ellipse.circumference, abs=2e-3)


def cpp_options(folder: Path) -> list[str]:
    """Returns what g++ needs for onnxruntime and OpenCV, or skips the test.

    The Python package brings onnxruntime's library, but no registry that CI reaches its headers;
    they are in the archives of its releases, and in Debian's libonnxruntime-dev from 14 on.
    """
    headers = (os.environ.get("FETAL_FLAX_ONNXRUNTIME_HEADERS", ""), "/usr/include/onnxruntime")
    include = next((path for path in headers if path and (Path(path) / HEADER).exists()), None)
    if include is None:
        pytest.skip(f"no {HEADER}: set FETAL_FLAX_ONNXRUNTIME_HEADERS to the folder that holds it")
    if not (shutil.which("g++") and shutil.which("pkg-config")):
        pytest.skip("no g++ or no pkg-config on PATH")
    asked = ["pkg-config", "--cflags", "opencv4"]
    opencv = subprocess.run(asked, capture_output=True, text=True)
    if opencv.returncode:
        pytest.skip("no headers of OpenCV: install libopencv-dev")
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    (folder / "libonnxruntime.so.1").symlink_to(library)  # As it is named in the program.
    opencv_libraries = ("-lopencv_core", "-lopencv_imgproc", "-lopencv_imgcodecs")
    found = ("-isystem", include, str(library), f"-Wl,-rpath,{folder}")
    return [*opencv.stdout.split(), *found, *opencv_libraries]
