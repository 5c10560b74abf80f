import csv
import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import jax
import numpy as np
import pydicom
import pydicom.data
import pydicom.uid
import pytest

from fetal_flax._util import pipeline
from fetal_flax._util.files import replacing
from fetal_flax.checkpoints import Checkpoint, Description, shipped
from fetal_flax.commands.main import main
from fetal_flax.config import ModelConfig
from fetal_flax.data.images import read_gray
from fetal_flax.errors import InputError
from fetal_flax.inference import predict as module
from fetal_flax.inference import sources
from fetal_flax.inference.assessment import native_mask
from fetal_flax.inference.predict import predict
from fetal_flax.inference.segmenter import Segmenter, load
from fetal_flax.measurement.ellipse import Ellipse
from fetal_flax.measurement.gestational_age import gestational_age
from fetal_flax.measurement.head import OUTLINE_PX, measure_head
from fetal_flax.models import functional
from fetal_flax.reporting import pictures

pytestmark = pytest.mark.usefixtures("quick_compilation")

DICOM = Path(pydicom.data.__file__).parent / "test_files"


@pytest.fixture(scope="module")
def checkpoint(save_network, tmp_path_factory) -> Path:
    """An untrained network whose masks of noise are neither empty nor full."""
    directory = tmp_path_factory.mktemp("checkpoint") / "network"
    model = ModelConfig(name="unet", base_width=4)
    variables = functional.init(model, 0)
    saved = Checkpoint(variables, Description("network", model, (64, 64)))
    (logits,) = Segmenter(saved).logits([noise((64, 64))])
    variables.params["head/bias"] -= float(np.median(logits))
    save_network(directory, saved)
    return directory


def noise(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write_images(folder: Path, *names: str, shape: tuple[int, int] = (40, 56)) -> Path:
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate(names):
        assert cv2.imwrite(str(folder / name), noise(shape, seed))
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_an_image_gets_mask_overlay_and_logits(checkpoint, tmp_path):
    source = write_images(tmp_path / "in", "a.png", shape=(70, 101)) / "a.png"
    output = tmp_path / "out"
    report = predict(checkpoint, source, output, save_logits=True)
    assert (report.predicted, report.failed) == (("a",), ())
    tables = ["measurements.csv", "overlays/a.png", "settings.json"]
    assert files(output) == ["logits/a.npy", "masks/a.png", *tables]

    image = read_gray(source)
    logits = np.load(output / "logits" / "a.npy")
    assert logits.shape == (64, 64) and logits.dtype == np.float32
    (expected,) = load(checkpoint).logits([image])
    np.testing.assert_array_equal(logits, expected)

    written = cv2.imread(str(output / "masks" / "a.png"), cv2.IMREAD_UNCHANGED)
    mask = native_mask(logits, image.shape)
    assert written is not None and mask.any() and not mask.all()
    np.testing.assert_array_equal(written, np.where(mask, 255, 0))

    bgr = cv2.imread(str(output / "overlays" / "a.png"), cv2.IMREAD_UNCHANGED)
    assert bgr is not None
    expected = pictures.overlay(image, prediction=mask)
    head = measure_head(mask, outline_px=OUTLINE_PX["hc18"])
    if head:
        expected = pictures.draw_ellipse(expected, head.ellipse)
    np.testing.assert_array_equal(bgr[..., ::-1], expected)


def test_logits_are_left_out_unless_asked_for(checkpoint, tmp_path):
    predict(checkpoint, write_images(tmp_path / "in", "a.png"), tmp_path / "out")
    assert not (tmp_path / "out" / "logits").exists()


HEAD = Ellipse(center_x=28.0, center_y=20.0, semi_major=20.4, semi_minor=14.4, angle=0.3)


@pytest.fixture
def sees_a_head(monkeypatch):
    """The network's masks are heads, but for an image whose first pixel is 0: it sees none."""

    def segment(self, items, image):
        for item in items:
            mask = HEAD.filled(*image(item).shape) if image(item)[0, 0] else 0 * image(item)
            yield item, np.where(mask, 9, -9).astype(np.float32)[None]

    monkeypatch.setattr(Segmenter, "segment", segment)


def measurements(output: Path) -> dict[str, dict[str, str]]:
    with (output / "measurements.csv").open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def write_sizes(path: Path, **sizes: object) -> Path:
    rows = "".join(f"{name}.png,{size}\r\n" for name, size in sizes.items())
    path.write_text("filename,pixel size(mm)\r\n" + rows)
    return path


def test_heads_are_measured_in_millimetres(checkpoint, sees_a_head, tmp_path):
    source = write_images(tmp_path / "in", "a.png")
    cv2.imwrite(str(source / "b.png"), np.zeros((40, 56), np.uint8))
    sizes = write_sizes(tmp_path / "sizes.csv", a=0.5, b=0.25, other=1)
    predict(checkpoint, source, tmp_path / "out", pixel_size_csv=sizes)
    rows = measurements(tmp_path / "out")
    assert tuple(rows["a"]) == tuple(module.MEASUREMENTS)
    # A converted checkpoint's masks hold the outline, which is no part of the head.
    outline = OUTLINE_PX["hc18"]
    head = dataclasses.replace(
        HEAD, semi_major=HEAD.semi_major - outline, semi_minor=HEAD.semi_minor - outline
    )
    for column, expected in (
        ("hc_mm", 0.5 * head.circumference),
        ("bpd_mm", head.semi_minor),
        ("ofd_mm", head.semi_major),
        ("center_x_px", 28),
        ("semi_minor_px", head.semi_minor),
        ("angle_rad", 0.3),
    ):
        assert float(rows["a"][column]) == pytest.approx(expected, rel=0.02), column
    assert (rows["a"]["touches_border"], rows["a"]["components"]) == ("False", "1")
    assert rows["b"]["hc_mm"] == rows["b"]["center_x_px"] == ""
    assert (rows["b"]["pixel_size_mm"], rows["b"]["components"]) == ("0.250000", "0")


def test_ages_and_flags_are_told(checkpoint, sees_a_head, tmp_path, capsys):
    source = write_images(tmp_path / "in", "a.png")
    cv2.imwrite(str(source / "b.png"), np.zeros((40, 56), np.uint8))
    sizes = write_sizes(tmp_path / "sizes.csv", a=1.5, b=1.5)
    output = tmp_path / "out"
    flags = {"checkpoint": checkpoint, "input": source, "output": output, "pixel-size-csv": sizes}
    command = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    assert main(["predict", *command]) == 0
    assert "look at 1 of them (column flags): b" in capsys.readouterr().out
    rows = measurements(output)
    age = gestational_age(float(rows["a"]["hc_mm"]))
    assert age is not None
    told = [float(rows["a"][f"ga_{name}weeks"]) for name in ("", "low_", "high_")]
    assert told == pytest.approx(list(age), abs=0.006)
    assert rows["a"]["flags"] == "" and rows["b"]["flags"] == "no_head"
    assert float(rows["a"]["ellipse_agreement"]) > 0.97 and float(rows["a"]["confidence"]) > 0.99
    assert rows["b"]["ga_weeks"] == rows["b"]["ellipse_agreement"] == rows["a"]["tta_dice"] == ""


def test_of_mirror_images_the_spread_is_told(checkpoint, monkeypatch, tmp_path):
    narrower = dataclasses.replace(HEAD, semi_major=18.4)

    def segment(self, items, image):
        for item in items:
            masks = [ellipse.filled(*image(item).shape) for ellipse in (HEAD, narrower)]
            yield item, np.where(np.stack(masks), 9, -9).astype(np.float32)

    monkeypatch.setattr(Segmenter, "segment", segment)
    source = write_images(tmp_path / "in", "a.png")
    sizes = write_sizes(tmp_path / "sizes.csv", a=0.5)
    predict(checkpoint, source, tmp_path / "out", pixel_size_csv=sizes)
    row = measurements(tmp_path / "out")["a"]
    masks = [ellipse.filled(40, 56) > 0 for ellipse in (HEAD, narrower)]
    heads = [measure_head(mask, outline_px=OUTLINE_PX["hc18"]) for mask in masks]
    assert heads[0] and heads[1]
    spread = heads[0].in_mm(0.5).circumference - heads[1].in_mm(0.5).circumference
    assert float(row["tta_hc_spread_mm"]) == pytest.approx(spread, abs=0.006) and spread > 2
    both, total = (masks[0] & masks[1]).sum(), masks[0].sum() + masks[1].sum()
    assert float(row["tta_dice"]) == pytest.approx(2 * both / total, abs=6e-5)


def test_without_pixel_sizes_the_ellipse_is_in_pixels_alone(checkpoint, sees_a_head, tmp_path):
    predict(checkpoint, write_images(tmp_path / "in", "a.png"), tmp_path / "out")
    row = measurements(tmp_path / "out")["a"]
    assert row["hc_mm"] == row["bpd_mm"] == row["ofd_mm"] == row["pixel_size_mm"] == ""
    assert float(row["semi_major_px"]) == pytest.approx(HEAD.semi_major - 1.4, rel=0.02)


def test_images_without_a_pixel_size_are_named_before_anything_is_written(checkpoint, tmp_path):
    source = write_images(tmp_path / "in", "a.png", "b.png", "c.png", "d.png", "e.png")
    sizes = write_sizes(tmp_path / "sizes.csv", a=0.5)
    with pytest.raises(InputError, match=r"no row for b\.png, c\.png, d\.png and 1 more"):
        predict(checkpoint, source, tmp_path / "out", pixel_size_csv=sizes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["0", "-1", "nan", "", "wide"])
def test_a_pixel_size_that_is_none_is_named(checkpoint, tmp_path, size):
    source = write_images(tmp_path / "in", "a.png")
    sizes = write_sizes(tmp_path / "sizes.csv", a=size)
    with pytest.raises(InputError, match=r"sizes\.csv.*a\.png.*not a positive number"):
        predict(checkpoint, source, tmp_path / "out", pixel_size_csv=sizes)


def test_one_pixel_size_is_taken_for_all_images(checkpoint, sees_a_head, tmp_path):
    source = write_images(tmp_path / "in", "a.png", "b.png")
    shutil.copy(DICOM / "examples_palette.dcm", source / "c.dcm")  # It has a size of its own.
    flags = {"checkpoint": checkpoint, "input": source, "output": tmp_path / "out"}
    command = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    assert main(["predict", *command, "--pixel-size", "0.5"]) == 0
    rows = measurements(tmp_path / "out")
    assert [row["pixel_size_mm"] for row in rows.values()] == ["0.500000"] * 3
    sizes = write_sizes(tmp_path / "sizes.csv", a=0.5, b=0.5)
    predict(checkpoint, source, tmp_path / "by_csv", pixel_size_csv=sizes)
    by_csv = measurements(tmp_path / "by_csv")
    assert float(rows["a"]["hc_mm"]) > 20
    assert (rows["a"], rows["b"]) == (by_csv["a"], by_csv["b"])


@pytest.mark.parametrize("size", ["0", "-0.1", "nan", "inf", "1000"])
def test_a_pixel_size_must_be_positive_and_finite(checkpoint, tmp_path, capsys, size):
    source = write_images(tmp_path / "in", "a.png")
    flags = {"checkpoint": checkpoint, "input": source, "output": tmp_path / "out"}
    command = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    assert main(["predict", *command, f"--pixel-size={size}"]) == 2
    assert "is not a positive number of mm below 1000" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_pixel_size_beside_a_csv_is_refused(checkpoint, tmp_path):
    source = write_images(tmp_path / "in", "a.png")
    sizes = write_sizes(tmp_path / "sizes.csv", a=0.5)
    for given in (sizes, tmp_path / "nowhere.csv"):
        with pytest.raises(InputError, match="--pixel-size and --pixel-size-csv are both given"):
            predict(checkpoint, source, tmp_path / "out", pixel_size_csv=given, pixel_size_mm=0.5)
    assert not (tmp_path / "out").exists()


def test_of_a_folder_the_images_in_it_are_taken_in_order(checkpoint, tmp_path):
    names = ("d.JPG", "b.png", "e.jpeg", "c.bmp", "a.tif", "f.TIFF", "g.webp")
    source = write_images(tmp_path / "in", *names, "b_Annotation.png")
    write_images(source / "deeper", "h.png")
    (source / "notes.txt").write_text("no image")
    report = predict(checkpoint, source, tmp_path / "out")
    assert (report.predicted, report.failed) == (tuple("abcdefg"), ())
    assert files(tmp_path / "out" / "masks") == [f"{name}.png" for name in "abcdefg"]
    assert report.skipped == {"HC18 outline": 1, "folder": 1, ".txt file": 1}


def test_an_outline_that_is_named_is_taken(checkpoint, tmp_path):
    source = write_images(tmp_path / "in", "b_Annotation.png") / "b_Annotation.png"
    assert predict(checkpoint, source, tmp_path / "out").predicted == ("b_Annotation",)


def write_garbage(folder: Path) -> dict[str, str]:
    """Writes what is no usable image; returns what is to be said of each."""
    noisy = cv2.imencode(".png", noise((40, 56)))[1].tobytes()
    huge = cv2.imencode(".png", np.zeros((20_000, 20_000), np.uint8))[1].tobytes()
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes(noisy[: len(noisy) // 2])
    (folder / "torn.jpg").write_bytes(cv2.imencode(".jpg", noise((40, 56)))[1].tobytes()[:900])
    (folder / "huge.png").write_bytes(huge)
    (folder / "wide.tif").write_bytes(
        cv2.imencode(".tif", np.zeros((7_000, 7_000), np.uint8))[1].tobytes()
    )
    (folder / "text.dcm").write_text("no image")
    (folder / "nowhere.png").symlink_to("nowhere")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    cv2.imwrite(str(folder / "1x1.png"), noise((1, 1)))
    cv2.imwritemulti(str(folder / "pages.tif"), [noise((40, 56)), noise((40, 56))])
    # Root may read everything, so what can't be read is a file that fails while it is read.
    (folder / "unreadable.png").symlink_to("/proc/self/mem")
    return {
        "text.png": "is not an image that can be read",
        "empty.png": "is empty",
        "cut.png": "is not an image that can be read",
        "torn.jpg": "is not an image that can be read",
        "huge.png": "has more than 33,554,432 pixels: crop or shrink it",
        "wide.tif": "has more than 33,554,432 pixels: crop or shrink it",
        "text.dcm": "is no DICOM image that can be read",
        "nowhere.png": "no such image file",
        "folder.png": "is a directory",
        "pipe.png": "is no regular file",
        "1x1.png": "has 1×1 pixels, too few to show a head",
        "pages.tif": "holds 2 images: save each as a file of its own",
        "unreadable.png": "can't read",
    }


def test_garbage_is_named_and_the_others_are_processed(checkpoint, tmp_path, capsys):
    source = write_images(tmp_path / "in", "a.png", "d.png")
    said = write_garbage(source)
    cv2.imwrite(str(source / "deep.png"), noise((40, 56)).astype(np.uint16) * 257)
    cv2.imwrite(str(source / "rgba.png"), np.stack([noise((40, 56))] * 4, -1))
    output = tmp_path / "out"
    flags = ["--checkpoint", str(checkpoint), "--input", str(source), "--output", str(output)]
    assert main(["predict", *flags]) == 2
    assert list(measurements(output)) == ["a", "d", "deep", "rgba"]
    printed = [line for line in capsys.readouterr().err.splitlines() if "fetal-flax" in line]
    assert len(printed) == len(said)
    for name, sentence in said.items():
        assert any(f"/{name}" in line and sentence in line for line in printed), name
    # The results of `d` are not those of a file that was left out, nor do depth and colour count.
    assert predict(checkpoint, source / "d.png", tmp_path / "alone").failed == ()
    assert (output / "masks" / "d.png").read_bytes() == (
        tmp_path / "alone" / "masks" / "d.png"
    ).read_bytes()
    a, deep, rgba = (read_gray(output / "masks" / f"{n}.png") for n in ("a", "deep", "rgba"))
    np.testing.assert_array_equal(a, deep)
    np.testing.assert_array_equal(a, rgba)


def test_a_single_file_that_can_not_be_read_is_reported(checkpoint, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    report = predict(checkpoint, tmp_path / "a.png", tmp_path / "out")
    assert report.predicted == () and "a.png" in report.failed[0]
    assert not (tmp_path / "out").exists()


def test_of_files_of_the_same_name_the_first_is_taken(checkpoint, tmp_path):
    source = write_images(tmp_path / "in", "0.png", "a.bmp", "a.png")
    report = predict(checkpoint, source, tmp_path / "out")
    assert report.predicted == ("0", "a")
    assert len(report.failed) == 1
    assert "/a.png would be written as a.png, as a.bmp is: rename one" in report.failed[0]
    predict(checkpoint, source / "a.bmp", tmp_path / "alone")
    among_others, alone = (tmp_path / out / "masks" / "a.png" for out in ("out", "alone"))
    assert among_others.read_bytes() == alone.read_bytes()


def test_dicom_files_bring_their_pixel_size(checkpoint, sees_a_head, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    # Without an ending, as scanners write them, and a clip.
    shutil.copy(DICOM / "examples_palette.dcm", source / "1.2.840.1")
    shutil.copy(DICOM / "examples_rgb_color.dcm", source / "1.2.840.2")
    shutil.copy(DICOM / "examples_ybr_color.dcm", source / "clip.dcm")
    sizes = write_sizes(tmp_path / "sizes.csv", other=1)
    report = predict(checkpoint, source, tmp_path / "out", pixel_size_csv=sizes)
    assert report.failed == ()
    rows = measurements(tmp_path / "out")
    clip = [f"clip_{number:04d}" for number in range(1, 31)]
    assert list(rows) == ["1.2.840.1", "1.2.840.2", *clip]
    assert float(rows["1.2.840.1"]["pixel_size_mm"]) == pytest.approx(0.26228788)
    assert rows["1.2.840.2"]["pixel_size_mm"] == rows["1.2.840.2"]["hc_mm"] == ""
    assert {rows[name]["pixel_size_mm"] for name in clip} == {"0.510497"}
    assert read_gray(tmp_path / "out" / "masks" / "clip_0030.png").shape == (240, 320)
    # The user's word goes before the file's.
    sizes.write_text("filename,pixel size(mm)\n1.2.840.1,0.5\n")
    alone = source / "1.2.840.1"
    predict(checkpoint, alone, tmp_path / "alone", pixel_size_csv=sizes)
    assert measurements(tmp_path / "alone")["1.2.840.1"]["pixel_size_mm"] == "0.500000"


def test_inputs_without_an_image_are_input_errors(checkpoint, tmp_path):
    empty = write_images(tmp_path / "in", "a_Annotation.png")
    (tmp_path / "notes.txt").write_text("")
    for source, message in (
        (empty, "in holds no image"),
        (tmp_path / "gone.png", r"gone\.png doesn't exist"),
        (tmp_path / "notes.txt", r"notes\.txt is no image"),
    ):
        with pytest.raises(InputError, match=message):
            predict(checkpoint, source, tmp_path / "out")


def test_results_overwrite_files_of_their_names_and_no_others(checkpoint, tmp_path):
    masks = tmp_path / "out" / "masks"
    masks.mkdir(parents=True)
    (masks / "a.png").write_bytes(b"old")
    (masks / "z.png").write_bytes(b"old")
    predict(checkpoint, write_images(tmp_path / "in", "a.png"), tmp_path / "out")
    assert read_gray(masks / "a.png").shape == (40, 56)
    assert (masks / "z.png").read_bytes() == b"old"


def test_results_that_can_not_be_written_are_an_input_error(checkpoint, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="choose an output folder"):
        predict(checkpoint, write_images(tmp_path / "in", "a.png"), tmp_path / "out")


@pytest.mark.parametrize("devices", [8, pytest.param(3, marks=pytest.mark.slow)])
def test_devices_that_share_a_folder_write_what_one_writes(
    checkpoint, tmp_path, monkeypatch, devices
):
    source = write_images(tmp_path / "in", *(f"{i:02d}.png" for i in range(11)))
    for output, count in (("alone", 1), ("together", devices)):
        monkeypatch.setattr(jax, "local_devices", lambda count=count: jax.devices()[:count])
        predict(checkpoint, source, tmp_path / output, pixel_size_mm=0.5, save_logits=True)
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert files(alone) == files(together) and len(files(alone)) == 3 * 11 + 2
    for name in files(alone):
        assert (alone / name).read_bytes() == (together / name).read_bytes(), name


def test_no_more_images_are_held_in_a_longer_folder(checkpoint, tmp_path, monkeypatch):
    source = write_images(tmp_path / "in", *(f"{i:03d}.png" for i in range(120)), shape=(16, 16))
    monkeypatch.setattr(pipeline, "available_cpus", lambda: 2)
    reads, writes, counting = sources.read_gray, module.write_mask, threading.Lock()
    held = most = 0

    def count(change: int) -> None:
        nonlocal held, most
        with counting:
            held += change
            most = max(most, held)

    def read(path):
        count(1)
        return reads(path)

    def write(path, mask):
        writes(path, mask)
        count(-1)

    monkeypatch.setattr(sources, "read_gray", read)
    monkeypatch.setattr(module, "write_mask", write)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    assert len(predict(checkpoint, source, tmp_path / "out").predicted) == 120
    # Two batches, and what the threads of the four stages hold.
    assert most <= 2 * 16 + 4 * (2 + 1) and held == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_row_for_whatever_is_written(
    checkpoint, tmp_path, monkeypatch, capsys, number
):
    names = [f"{i:03d}" for i in range(60)]
    source = write_images(tmp_path / "in", *(f"{name}.png" for name in names), shape=(16, 16))
    writes, before = module.write_mask, signal.getsignal(number)

    def write(path, mask):
        writes(path, mask)
        if path.stem == "004":
            os.kill(os.getpid(), number)

    monkeypatch.setattr(module, "write_mask", write)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    output = tmp_path / "out"
    flags = ["--checkpoint", str(checkpoint), "--input", str(source), "--output", str(output)]
    assert main(["predict", *flags]) == 130
    said = capsys.readouterr().err
    done = list(measurements(output))
    assert 5 <= len(done) < 60 and done == names[: len(done)]
    assert f"interrupted: the results of {len(done)} images are complete" in said
    for folder in ("masks", "overlays"):
        assert files(output / folder) == [f"{name}.png" for name in done]
        assert all(read_gray(path).size for path in (output / folder).iterdir())
    assert signal.getsignal(number) is before


def run(*flags: object) -> int:
    return main(["predict", *map(str, flags)])


def test_a_table_is_for_people_and_its_json_for_programs(checkpoint, sees_a_head, tmp_path):
    source = write_images(tmp_path / "in", "a.png")
    cv2.imwrite(str(source / "b.png"), np.zeros((40, 56), np.uint8))
    output = tmp_path / "out"
    flags = ("--checkpoint", checkpoint, "--input", source, "--output", output)
    assert run(*flags, "--pixel-size", "1.5", "--json") == 0
    rows = measurements(output)
    for column, decimals in module.MEASUREMENTS.items():
        if decimals is not None and rows["a"][column]:
            assert re.fullmatch(rf"-?\d+\.\d{{{decimals}}}", rows["a"][column]), column
        if column.endswith("_mm") and column != "pixel_size_mm":
            assert decimals == 2
        if column.endswith("_px"):
            assert decimals == 3
    assert rows["a"]["network"] == str(checkpoint)
    whole = {row["name"]: row for row in json.loads((output / "measurements.json").read_text())}
    assert list(whole) == ["a", "b"] and list(whole["a"]) == list(module.MEASUREMENTS)
    assert whole["b"]["hc_mm"] is None and whole["a"]["touches_border"] is False
    assert f"{whole['a']['hc_mm']:.2f}" == rows["a"]["hc_mm"]
    assert whole["a"]["hc_mm"] != round(whole["a"]["hc_mm"], 6)
    # Without the flag, what is there from before is not of these rows.
    assert run(*flags) == 0
    assert not (output / "measurements.json").exists()


def test_a_shipped_network_is_named_without_its_folder(
    threshold_network, save_network, tmp_path, monkeypatch
):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "networks")
    save_network(shipped.FOLDER / shipped.DEFAULT_NETWORK, threshold_network)
    predict(shipped.default(), write_images(tmp_path / "in", "a.png"), tmp_path / "out")
    assert measurements(tmp_path / "out")["a"]["network"] == shipped.DEFAULT_NETWORK


@pytest.mark.parametrize("size", [0.1, 10.0, 100.0])
def test_a_circumference_that_no_fetus_has_is_flagged(checkpoint, sees_a_head, tmp_path, size):
    source = write_images(tmp_path / "in", "a.png")
    predict(checkpoint, source, tmp_path / "out", pixel_size_mm=size)
    row = measurements(tmp_path / "out")["a"]
    assert not 30 <= float(row["hc_mm"]) <= 450 and row["flags"] == "implausible_size"


def test_a_mask_all_over_the_image_says_so(checkpoint, monkeypatch, tmp_path):
    def segment(self, items, image):
        for item in items:
            yield item, np.full((1, 64, 64), 9, np.float32)

    monkeypatch.setattr(Segmenter, "segment", segment)
    predict(checkpoint, write_images(tmp_path / "in", "a.png"), tmp_path / "out")
    assert measurements(tmp_path / "out")["a"]["flags"] == "covers_image"


def test_no_file_costs_the_others_their_results(checkpoint, tmp_path, monkeypatch, capsys):
    source = write_images(tmp_path / "in", "a.png", "b.png", "c.png")
    read = sources.read_gray

    def fails(path):
        if path.name == "b.png":
            raise ZeroDivisionError("no\nidea")
        return read(path)

    monkeypatch.setattr(sources, "read_gray", fails)
    flags = ("--checkpoint", checkpoint, "--input", source, "--output", tmp_path / "out")
    assert run(*flags) == 2
    assert list(measurements(tmp_path / "out")) == ["a", "c"]
    said = capsys.readouterr().err
    assert "b.png can't be read (ZeroDivisionError: no idea): copy or export it again" in said


def test_names_that_are_no_utf_8_or_too_long_have_results(checkpoint, tmp_path):
    image = cv2.imencode(".png", noise((40, 56)))[1].tobytes()
    source = tmp_path / "in"
    source.mkdir()
    long, longer = "x" * 251, "ü" * 125
    names = [b"\xff \xfc.png", f"{long}.png".encode(), f"{longer}.png".encode(), b"new\nline.png"]
    for name in names:
        (source / os.fsdecode(name)).write_bytes(image)
    shutil.copy(DICOM / "examples_rgb_color.dcm", source / ("1" * 255))
    report = predict(checkpoint, source, tmp_path / "out", save_logits=True)
    assert report.failed == () and len(report.predicted) == 5
    rows = measurements(tmp_path / "out")
    assert {r"\xff \xfc", "new\nline"} < set(rows) and len(rows) == 5
    for name in rows:
        for folder, ending in (("masks", "png"), ("overlays", "png"), ("logits", "npy")):
            assert (tmp_path / "out" / folder / f"{name}.{ending}").is_file()
    shortened = [name for name in rows if name.startswith(("xxx", "üüü", "111"))]
    assert len(shortened) == 3 and all(len(name.encode()) <= 240 for name in shortened)


def test_where_nothing_can_be_read_no_older_table_stands(checkpoint, tmp_path, capsys):
    source, output = write_images(tmp_path / "in", "a.png"), tmp_path / "out"
    flags = ("--checkpoint", checkpoint, "--input", source, "--output", output)
    assert run(*flags, "--json") == 0
    (source / "a.png").write_bytes(b"no image")
    capsys.readouterr()
    assert run(*flags) == 2
    printed = capsys.readouterr()
    assert printed.out == f"no image could be read: nothing was written to {output}\n"
    assert not (output / "measurements.csv").exists()
    assert not (output / "measurements.json").exists()


def write_without_image(path: Path, kind: str) -> None:
    dataset = pydicom.dcmread(DICOM / "examples_rgb_color.dcm")
    del dataset.PixelData, dataset.Rows, dataset.Columns
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.UID(kind)
    dataset.save_as(path)


def test_what_lies_beside_scans_in_a_clinic_is_counted(checkpoint, tmp_path, capsys):
    source = write_images(tmp_path / "in", "a.png")
    for name in (".DS_Store", "._a.png", "Thumbs.db", "notes", "report.pdf"):
        (source / name).write_bytes(b"\0" * 200)
    write_without_image(source / "SR000001", "1.2.840.10008.5.1.4.1.1.88.33")
    write_without_image(source / "DICOMDIR", "1.2.840.10008.1.3.10")
    flags = ("--checkpoint", checkpoint, "--input", source, "--output", tmp_path / "out")
    assert run(*flags) == 0
    printed = capsys.readouterr()
    assert (
        "left out: .db file (1), .pdf file (1), DICOM directory file (1), DICOM structured report "
        "(1), file without an ending (1), hidden file (2)\n" in printed.out
    )
    assert list(measurements(tmp_path / "out")) == ["a"]
    with pytest.raises(InputError, match=r"holds no image \(but hidden file \(1\)\)"):
        (tmp_path / "none").mkdir()
        (tmp_path / "none" / ".DS_Store").touch()
        predict(checkpoint, tmp_path / "none", tmp_path / "out")


@pytest.mark.parametrize("after", [1, 3])
def test_a_full_disk_leaves_whole_rows_and_says_how_many(
    checkpoint, tmp_path, monkeypatch, capsys, after
):
    names = [f"{i}.png" for i in range(6)]
    source, output = write_images(tmp_path / "in", *names), tmp_path / "out"
    writes, count = os.write, itertools.count()

    def write(descriptor, content):
        if Path(f"/proc/self/fd/{descriptor}").resolve().suffix == ".csv" and next(count) >= after:
            writes(descriptor, content[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return writes(descriptor, content)

    monkeypatch.setattr(os, "write", write)
    flags = ("--checkpoint", checkpoint, "--input", source, "--output", output)
    assert run(*flags) == 2
    said = capsys.readouterr().err
    assert "measurements.csv (No space left on device): make room" in said
    assert f"the results of {after} images are complete" in said and "6 files" in said
    assert list(measurements(output)) == [name[0] for name in names[:after]]
    assert (output / "measurements.csv").read_bytes().endswith(b"\n")


def test_a_killed_process_leaves_whole_rows(checkpoint, compiled_alike, tmp_path):
    source, output = write_images(tmp_path / "in", *(f"{i}.png" for i in range(8))), tmp_path / "o"
    code = f"""
import os, signal
from pathlib import Path
from fetal_flax._util import files
from fetal_flax.inference.predict import predict
add, rows = files.GrowingFile.add, []
def kill(self, content):
    add(self, content)
    rows.append(content)
    if len(rows) == 6:
        with files.replacing(Path({str(output)!r}) / "masks" / "7.png") as temporary:
            temporary.touch()
            os.kill(os.getpid(), signal.SIGKILL)
files.GrowingFile.add = kill
predict(Path({str(checkpoint)!r}), Path({str(source)!r}), Path({str(output)!r}), save_json=True)
"""
    ran = subprocess.run([sys.executable, "-c", code], env=compiled_alike, capture_output=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()
    assert list(measurements(output)) == ["0", "1", "2"]
    assert [row["name"] for row in json.loads((output / "measurements.json").read_text())] == [
        "0",
        "1",
        "2",
    ]
    report = predict(checkpoint, source, output, save_json=True, resume=True)
    assert report.resumed == 3
    predict(checkpoint, source, tmp_path / "undisturbed", save_json=True)
    assert_same_files(output, tmp_path / "undisturbed")


def test_what_others_are_writing_beside_the_table_stays(checkpoint, tmp_path):
    source, output = write_images(tmp_path / "in", "a.png"), tmp_path / "out"
    output.mkdir()
    with replacing(output / "network.onnx") as temporary:
        temporary.write_bytes(b"whole")
        predict(checkpoint, source, output)
    assert (output / "network.onnx").read_bytes() == b"whole"


def test_a_folder_whose_name_is_too_long_is_one_sentence(checkpoint, tmp_path):
    source = write_images(tmp_path / "in", "a.png")
    with pytest.raises(InputError, match=r"\(File name too long\): choose an output folder"):
        predict(checkpoint, source, tmp_path / ("x" * 300))


def assert_same_files(one: Path, other: Path) -> None:
    assert files(one) == files(other)
    for name in files(one):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def lose_the_last_objects(output: Path) -> int:
    path = output / "measurements.json"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    return 2


def lose_half_a_row(output: Path) -> int:
    os.truncate(output / "measurements.csv", (output / "measurements.csv").stat().st_size - 9)
    return 3


def lose_a_mask(output: Path) -> int:
    (output / "masks" / "b.png").unlink()
    return 1


def lose_nothing(output: Path) -> int:
    return 4


def lose_the_table(output: Path) -> int:
    (output / "measurements.csv").unlink()
    return 0


@pytest.mark.parametrize(
    "lose", [lose_nothing, lose_half_a_row, lose_the_last_objects, lose_a_mask, lose_the_table]
)
def test_what_is_done_is_skipped_and_the_rest_is_measured(checkpoint, tmp_path, lose):
    source = write_images(tmp_path / "in", *(f"{name}.png" for name in "abcdef"))
    (source / "bad.png").write_bytes(b"no image")
    (source / "a.png").rename(source / 'a, "ä".png')
    wanted = {"pixel_size_mm": 0.5, "save_json": True, "save_logits": True}
    whole = predict(checkpoint, source, tmp_path / "undisturbed", **wanted)
    # As a call leaves it that ended behind the fourth image.
    output = shutil.copytree(tmp_path / "undisturbed", tmp_path / "out")
    for name, end in (("measurements.csv", b""), ("measurements.json", b"\n]\n")):
        lines = (output / name).read_bytes().splitlines(keepends=True)
        (output / name).write_bytes(b"".join(lines[:5]).removesuffix(b",\n") + end)
    for name in "ef":
        (output / "masks" / f"{name}.png").unlink()
    kept = lose(output)
    times = {name: (output / name).stat().st_mtime_ns for name in files(output)}
    report = predict(checkpoint, source, output, resume=True, **wanted)
    assert report == dataclasses.replace(whole, resumed=kept)
    assert_same_files(output, tmp_path / "undisturbed")
    written = [
        n
        for n in files(output / "masks")
        if times.get(f"masks/{n}") != (output / "masks" / n).stat().st_mtime_ns
    ]
    assert len(written) == 6 - kept


def test_a_finished_folder_takes_what_is_new(checkpoint, sees_a_head, tmp_path, capsys):
    source, output = write_images(tmp_path / "in", "b.png", "c.png"), tmp_path / "out"
    cv2.imwrite(str(source / "c.png"), np.zeros((40, 56), np.uint8))
    flags = ("--checkpoint", checkpoint, "--input", source, "--output", output, "--resume")
    assert run(*flags) == 0
    write_images(source, "a.png")
    assert run(*flags) == 0
    said = capsys.readouterr().out
    assert "3 images segmented (2 of them before)" in said
    assert said.count("look at 1 of them (column flags): c") == 2
    assert list(measurements(output)) == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (("--tta", "flip"), "was begun with another tta: give the same"),
        (("--json", "--save-logits"), "was begun with another save_logits, json"),
        (("--checkpoint", shipped.default()), "was begun with another network, network_sha256"),
        (("--pixel-size", "0.25"), "a.png has pixels of 0.250000 now, and was measured with 0.5"),
        ((), "a.png has pixels of unknown size now, and was measured with 0.500000"),
    ],
)
def test_rows_that_were_measured_otherwise_are_not_gone_on_with(
    checkpoint, tmp_path, capsys, other, said
):
    source, output = write_images(tmp_path / "in", "a.png"), tmp_path / "out"
    flags = ("--checkpoint", checkpoint, "--input", source, "--output", output)
    assert run(*flags, "--pixel-size", "0.5") == 0
    before = (output / "measurements.csv").read_bytes()
    size = () if "pixels" in said else ("--pixel-size", "0.5")
    assert run(*flags, *size, *other, "--resume") == 2
    printed = capsys.readouterr().err
    assert said in printed and "leave --resume out to measure all anew" in printed
    assert (output / "measurements.csv").read_bytes() == before
    for content in (None, b"", b"[]", b"{}"):
        (output / "settings.json").unlink()
        if content is not None:
            (output / "settings.json").write_bytes(content)
        assert run(*flags, "--pixel-size", "0.5", "--resume") == 2
        assert "settings.json doesn't tell what measurements.csv was" in capsys.readouterr().err
        (output / "settings.json").touch()
