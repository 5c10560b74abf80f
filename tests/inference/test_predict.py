from pathlib import Path

import cv2
import numpy as np
import pytest

from fetal_flax import checkpoints
from fetal_flax.checkpoints import Description
from fetal_flax.config import ModelConfig
from fetal_flax.data.images import read_gray
from fetal_flax.errors import InputError
from fetal_flax.evaluation import pictures
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
    assert files(output) == ["logits/a.npy", "masks/a.png", "overlays/a.png"]

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
    np.testing.assert_array_equal(bgr[..., ::-1], pictures.overlay(image, prediction=mask))


def test_logits_are_left_out_unless_asked_for(checkpoint, tmp_path):
    predict(checkpoint, write_images(tmp_path / "in", "a.png"), tmp_path / "out")
    assert files(tmp_path / "out") == ["masks/a.png", "overlays/a.png"]


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
