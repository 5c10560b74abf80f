import csv
import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest

from fetal_flax import checkpoints
from fetal_flax.checkpoints import Description
from fetal_flax.config import ModelConfig
from fetal_flax.data.ellipse import Ellipse
from fetal_flax.data.images import read_gray
from fetal_flax.errors import InputError
from fetal_flax.evaluation import pictures
from fetal_flax.evaluation.head import OUTLINE_PX, measure_head
from fetal_flax.inference import predict as module
from fetal_flax.inference.predict import predict
from fetal_flax.inference.predictor import Predictor, native_mask
from fetal_flax.models import functional


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """An untrained network whose masks of noise are neither empty nor full."""
    directory = tmp_path_factory.mktemp("checkpoint")
    model = ModelConfig(name="unet", base_width=4)
    variables = functional.init(model, 0)
    (logits,) = Predictor(model, variables, (64, 64)).logits([noise((64, 64))])
    variables.params["head/bias"] -= float(np.median(logits))
    checkpoints.save(directory, variables, Description("network", model, (64, 64)))
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
    assert files(output) == ["logits/a.npy", "masks/a.png", "measurements.csv", "overlays/a.png"]

    image = read_gray(source)
    logits = np.load(output / "logits" / "a.npy")
    assert logits.shape == (64, 64) and logits.dtype == np.float32
    (expected,) = Predictor.from_checkpoint(checkpoint).logits([image])
    np.testing.assert_array_equal(logits, expected)

    written = cv2.imread(str(output / "masks" / "a.png"), cv2.IMREAD_UNCHANGED)
    mask = native_mask(logits, image.shape)
    assert written is not None and mask.any() and not mask.all()
    np.testing.assert_array_equal(written, np.where(mask, 255, 0))

    bgr = cv2.imread(str(output / "overlays" / "a.png"), cv2.IMREAD_UNCHANGED)
    assert bgr is not None
    expected = pictures.overlay(image, prediction=mask)
    head = measure_head(mask, 1.0, outline_px=OUTLINE_PX["hc18"])
    if head:
        expected = pictures.draw_ellipse(expected, head.ellipse)
    np.testing.assert_array_equal(bgr[..., ::-1], expected)


def test_logits_are_left_out_unless_asked_for(checkpoint, tmp_path):
    predict(checkpoint, write_images(tmp_path / "in", "a.png"), tmp_path / "out")
    assert files(tmp_path / "out") == ["masks/a.png", "measurements.csv", "overlays/a.png"]


HEAD = Ellipse(center_x=28.0, center_y=20.0, semi_major=20.4, semi_minor=14.4, angle=0.3)


@pytest.fixture
def sees_a_head(monkeypatch):
    """The network's masks are heads, but for an image whose first pixel is 0: it sees none."""

    def segment(self, items, image):
        for item in items:
            mask = HEAD.filled(*image(item).shape) if image(item)[0, 0] else 0 * image(item)
            yield item, np.where(mask, 9, -9).astype(np.float32)

    monkeypatch.setattr(Predictor, "segment", segment)


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
    assert tuple(rows["a"]) == module.MEASUREMENTS
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
    assert (rows["b"]["pixel_size_mm"], rows["b"]["components"]) == ("0.25", "0")


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


def test_of_a_folder_the_images_in_it_are_taken_in_order(checkpoint, tmp_path):
    names = ("d.JPG", "b.png", "e.jpeg", "c.bmp", "a.tif", "f.TIFF")
    source = write_images(tmp_path / "in", *names, "b_Annotation.png")
    write_images(source / "deeper", "g.png")
    write_images(source / "folder.png", "h.png")
    (source / "notes.txt").write_text("no image")
    report = predict(checkpoint, source, tmp_path / "out")
    assert (report.predicted, report.failed) == (("a", "b", "c", "d", "e", "f"), ())
    assert files(tmp_path / "out" / "masks") == [f"{name}.png" for name in "abcdef"]


def test_an_outline_that_is_named_is_taken(checkpoint, tmp_path):
    source = write_images(tmp_path / "in", "b_Annotation.png") / "b_Annotation.png"
    assert predict(checkpoint, source, tmp_path / "out").predicted == ("b_Annotation",)


def test_files_that_can_not_be_read_are_named_and_the_others_processed(checkpoint, tmp_path):
    source = write_images(tmp_path / "in", "a.png", "d.png")
    (source / "b.png").write_bytes(b"no image")
    (source / "c.png").symlink_to("nowhere")
    report = predict(checkpoint, source, tmp_path / "out")
    assert report.predicted == ("a", "d")
    assert len(report.failed) == 2
    assert str(source / "b.png") in report.failed[0] and str(source / "c.png") in report.failed[1]
    alone = predict(checkpoint, source / "d.png", tmp_path / "alone")
    assert alone.predicted == ("d",)
    # The results of `d` are not those of a file that was left out.
    among_others, by_itself = (
        read_gray(tmp_path / out / "masks" / "d.png") for out in ("out", "alone")
    )
    np.testing.assert_array_equal(among_others, by_itself)


def test_a_single_file_that_can_not_be_read_is_reported(checkpoint, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    report = predict(checkpoint, tmp_path / "a.png", tmp_path / "out")
    assert report.predicted == () and "a.png" in report.failed[0]
    assert not (tmp_path / "out").exists()


def test_files_of_the_same_name_are_refused_before_anything_is_written(checkpoint, tmp_path):
    source = write_images(tmp_path / "in", "0.png", "a.jpg", "a.png")
    with pytest.raises(InputError, match=r"a\.jpg and a\.png would both be written as a\.png"):
        predict(checkpoint, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


def test_no_more_than_a_batch_of_images_is_held(checkpoint, tmp_path, monkeypatch):
    source = write_images(tmp_path / "in", *(f"{i:02d}.png" for i in range(36)), shape=(8, 8))
    held = [0]
    reads, writes = module.read_gray, module.write_mask

    def read(path):
        held.append(held[-1] + 1)
        return reads(path)

    def write(path, mask):
        held.append(held[-1] - 1)
        writes(path, mask)

    monkeypatch.setattr(module, "read_gray", read)
    monkeypatch.setattr(module, "write_mask", write)
    assert len(predict(checkpoint, source, tmp_path / "out").predicted) == 36
    assert max(held) == 16 and held[-1] == 0
