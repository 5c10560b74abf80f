"""A run from its config to its workdir: what it leaves behind, and what stopping it costs."""

import dataclasses
import itertools
import json
import math
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy import ndimage

from fetal_flax import checkpoints
from fetal_flax.config import (
    AugmentationConfig,
    EncoderConfig,
    ModelConfig,
    TrainConfig,
)
from fetal_flax.errors import InputError, Interrupted
from fetal_flax.inference.segmenter import Segmenter
from fetal_flax.measurement.ellipse_overlap import ellipse_dice
from fetal_flax.measurement.overlap import segmentation_metrics
from fetal_flax.models import functional
from fetal_flax.reporting import pictures
from fetal_flax.training.events import CallDone, Event
from fetal_flax.training.run import train, write_validation_sheet
from fetal_flax.training.setup import arithmetic, describe, prepare
from fetal_flax.training.workdir import read_config

ROOT = Path(__file__).parents[2]
TIMINGS = {"seconds", "images_per_second", "waiting"}

pytestmark = pytest.mark.usefixtures("tiny_network")


def test_a_run_leaves_config_split_metrics_pictures_and_logs(finished, small_config, read_rows):
    assert read_config(finished) == small_config()
    split = json.loads((finished / "split.json").read_text())
    assert not set(split["train"]) & set(split["validation"])
    assert len(split["train"]) + len(split["validation"]) == 45
    assert [row["epoch"] for row in read_rows(finished)] == ["1", "2"]
    assert json.loads((finished / "run.json").read_text())["pos_weight"] > 1
    for picture in ("curves.png", "validation.png"):
        assert cv2.imread(str(finished / picture)) is not None
    assert list((finished / "tensorboard").glob("events*"))
    assert list((finished / "profile").rglob("*.xplane.pb"))


@pytest.mark.usefixtures("never_trained")
def test_the_sheet_shows_validation_images_from_the_worst_ellipse_to_the_best(
    finished, small_config, monkeypatch
):
    run = prepare(small_config())
    records = [run.dataset.record(index) for index in run.split.validation]
    masks = {}
    for number, record in enumerate(records):
        masks[record.name] = np.roll(record.mask > 0, number * 4 % 7, axis=1)
        if number % 2:
            hole = np.asarray(ndimage.binary_erosion(record.mask, iterations=5), bool)
            masks[record.name] &= ~hole
    masks[records[3].name][:] = False
    sheets = []
    views = [np.where(mask, np.float32(9), np.float32(-9))[None] for mask in masks.values()]
    monkeypatch.setattr(Segmenter, "views", lambda self, images: iter(views))
    monkeypatch.setattr(pictures, "overlay_sheet", lambda path, images: sheets.append(images))
    write_validation_sheet(run, finished)
    (images,) = sheets
    assert images[0].name == records[3].name and images[0].ellipse is None
    assert {image.name for image in images} == masks.keys()
    for image in images:
        assert np.array_equal(image.prediction, masks[image.name])
        assert image.ellipse_dice == ellipse_dice(image.prediction, image.truth)
        assert image.dice == segmentation_metrics(image.prediction, image.truth)["dice"]
    dices, raw = ([getattr(image, name) for image in images] for name in ("ellipse_dice", "dice"))
    assert dices == sorted(dices) and raw != sorted(raw)


@pytest.mark.usefixtures("never_trained")
def test_a_runs_start_says_what_it_computes_in(small_config):
    assert ", float32, batch 8" in describe(prepare(small_config()))
    model = ModelConfig(name="unet", base_width=4)
    full = dataclasses.replace(model, matmul_precision="float32")
    assert "TF32" in arithmetic(model, "gpu") and arithmetic(full, "gpu") == "float32"
    assert arithmetic(dataclasses.replace(model, dtype="bfloat16"), "gpu") == "bfloat16"


def test_the_best_checkpoint_describes_itself(finished, read_rows):
    variables, description = checkpoints.load_checkpoint(finished)
    assert description.model == ModelConfig(name="unet", base_width=4)
    assert description.image_size == (32, 32)
    assert variables.params.keys() == functional.shapes(description.model).params.keys()
    dices = [float(row["validation_dice"]) for row in read_rows(finished)]
    assert description.progress["history"][-1]["validation_dice"] == max(dices)


def test_resuming_goes_on_exactly(finished, small_config, tmp_path, read_rows, same_state):
    train(small_config(epochs=1), tmp_path / "run")
    train(small_config(epochs=2), tmp_path / "run", resume=True)
    assert read_rows(tmp_path / "run") == read_rows(finished)
    assert same_state(tmp_path / "run", finished)


def on_device(config: TrainConfig, **data) -> TrainConfig:
    changed = dataclasses.replace(config.data, backend="device", **data)
    return dataclasses.replace(config, data=changed)


@pytest.mark.slow
def test_the_devices_own_batches_train_as_the_hosts_do(finished, small_config, tmp_path, read_rows):
    """Steps by ones and fours; the warp is a grey level off here and there."""
    for steps in (1, 4):
        config = on_device(small_config(), steps_per_dispatch=steps)
        workdir = tmp_path / str(steps)
        train(config, workdir)
        for ours, theirs in zip(read_rows(workdir), read_rows(finished), strict=True):
            for name in theirs:
                assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=2e-3), name
    events = list((tmp_path / "4" / "tensorboard").glob("events*"))
    assert len(events) == 1 and events[0].stat().st_size > 0


@pytest.mark.slow
def test_calls_of_more_or_fewer_steps_train_alike(finished, small_config, tmp_path, read_rows):
    config = small_config()
    for steps in (1, 3, 4):
        data = dataclasses.replace(config.data, steps_per_dispatch=steps)
        workdir = tmp_path / str(steps)
        train(dataclasses.replace(config, data=data), workdir)
        for ours, theirs in zip(read_rows(workdir), read_rows(finished), strict=True):
            for name in theirs:
                assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=1e-4), name


@pytest.mark.slow
def test_resuming_on_the_devices_own_batches_is_exact(small_config, tmp_path, read_rows):
    undisturbed = tmp_path / "undisturbed"
    train(on_device(small_config(), steps_per_dispatch=4), undisturbed)
    config = on_device(small_config(epochs=1), steps_per_dispatch=4)
    train(config, tmp_path / "run")
    config = on_device(small_config(epochs=2), steps_per_dispatch=4)
    train(config, tmp_path / "run", resume=True)
    assert read_rows(tmp_path / "run") == read_rows(undisturbed)


def with_recipe(config: TrainConfig) -> TrainConfig:
    """Everything that a recipe may add, besides what `small_config` was given."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, soft_masks=True),
        augmentation=AugmentationConfig(gain=0.3, gamma=0.5, blur_px=1, speckle=0.2, shadow=0.5),
        schedule=dataclasses.replace(
            config.schedule,
            decay="cosine",
            warmup_epochs=0.5,
            average_decay=0.9,
            select_by="ellipse_dice",
            early_stopping_patience=None,
        ),
    )


@pytest.fixture(scope="module")
def by_recipe(small_config, tmp_path_factory, tiny_networks) -> Path:
    """The workdir of an undisturbed run with everything that a recipe may add."""
    workdir = tmp_path_factory.mktemp("recipe") / "run"
    with tiny_networks():
        train(with_recipe(small_config(epochs=3)), workdir)
    return workdir


def test_a_recipe_is_resumed_exactly(by_recipe, small_config, tmp_path, read_rows, same_state):
    """Stopped in the middle of an epoch; the averages and what they are of both go on."""
    config = with_recipe(small_config(epochs=3))
    calls = itertools.count(1)

    def stop_in_the_second_epoch(event: Event) -> None:
        if isinstance(event, CallDone) and next(calls) == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", listeners=[stop_in_the_second_epoch])
    assert (tmp_path / "run" / "checkpoints" / "1000002").is_dir()
    train(config, tmp_path / "run", resume=True)
    assert read_rows(tmp_path / "run") == read_rows(by_recipe)
    assert same_state(tmp_path / "run", by_recipe)


def test_a_recipe_keeps_the_average_and_chooses_by_the_ellipse(by_recipe, read_rows):
    rows = read_rows(by_recipe)
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx(
        [3e-4 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 10)) for step in (3, 7, 11)]
    )
    _, description = checkpoints.load_checkpoint(by_recipe)
    best = max(float(row["validation_ellipse_dice"]) for row in rows)
    assert description.progress["history"][-1]["validation_ellipse_dice"] == best


def test_a_cosines_end_is_not_moved_by_resuming(by_recipe, small_config):
    with pytest.raises(InputError, match=r"schedule\.epochs"):
        train(with_recipe(small_config(epochs=4)), by_recipe, resume=True)


def test_a_run_begins_with_a_trained_network(finished, small_config, tmp_path):
    """At another image size; with a rate of nearly nothing it ends with the same parameters."""
    config = small_config(epochs=1)
    config = dataclasses.replace(
        config,
        init=str(finished),
        data=dataclasses.replace(config.data, image_size=(48, 48)),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-30),
    )
    theirs = checkpoints.load_checkpoint(finished)[0]
    for before, trained in zip(prepare(config).variables, theirs, strict=True):
        for name in trained:
            np.testing.assert_array_equal(before[name], trained[name])
    train(config, tmp_path / "run")
    ours = checkpoints.load_checkpoint(tmp_path / "run")[0]
    for name in theirs.params:
        np.testing.assert_array_equal(ours.params[name], theirs.params[name])


@pytest.mark.usefixtures("never_trained")
def test_a_frozen_encoder_can_begin_with_values_that_float16_holds(small_config):
    data = dataclasses.replace(small_config().data, image_size=(64, 64))
    for half in (False, True):
        encoder = EncoderConfig(weights="none", float16=half)
        setup = prepare(
            dataclasses.replace(small_config(), data=data, model=ModelConfig(), encoder=encoder)
        )
        for name, array in setup.variables.params.items():
            if name.endswith("kernel"):
                held = np.array_equal(np.asarray(array).astype(np.float16), array)
                assert held == (half and name.startswith("encoder/")), name


def test_a_run_does_not_begin_with_another_network(finished, small_config, tmp_path):
    config = dataclasses.replace(
        small_config(), init=str(finished), model=ModelConfig(name="unet", base_width=8)
    )
    with pytest.raises(InputError, match="setting init"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_early_stopping_ends_a_run(small_config, tmp_path, read_rows):
    # A rate of nearly nothing cannot improve for long.
    config = small_config(epochs=30, early_stopping_patience=1)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-30)
    workdir = tmp_path / "run"
    train(dataclasses.replace(config, optimizer=optimizer), workdir)
    assert len(read_rows(workdir)) < 30


def test_a_workdir_is_never_overwritten(finished, small_config):
    before = (finished / "metrics.csv").read_bytes()
    with pytest.raises(InputError, match="--resume"):
        train(small_config(), finished)
    assert (finished / "metrics.csv").read_bytes() == before


def test_resuming_with_another_config_is_refused(finished, small_config):
    config = small_config()
    other = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-2)
    )
    with pytest.raises(InputError, match=r"optimizer\.learning_rate"):
        train(other, finished, resume=True)


def test_resuming_with_other_data_is_refused(small_config, tmp_path):
    workdir = tmp_path / "run"
    train(small_config(epochs=1), workdir)
    manifest = json.loads((workdir / "split.json").read_text())
    manifest["train"].pop()
    (workdir / "split.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="split"):
        train(small_config(), workdir, resume=True)


def test_a_relative_data_folder_is_kept_absolute(small_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small_config(epochs=1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir="ok"))
    train(config, tmp_path / "run")
    assert read_config(tmp_path / "run").data.data_dir == str(tmp_path / "ok")
    described = checkpoints.load_checkpoint(tmp_path / "run").metadata.config
    assert described is not None and described["data"]["data_dir"] == str(tmp_path / "ok")


def test_resuming_nothing_is_refused(small_config, tmp_path):
    with pytest.raises(InputError, match="no run"):
        train(small_config(), tmp_path / "nothing", resume=True)


def test_a_missing_encoder_stops_before_anything_is_written(small_config, tmp_path):
    config = dataclasses.replace(
        small_config(),
        model=ModelConfig(),
        encoder=EncoderConfig(weights=str(tmp_path / "missing.pth")),
    )
    with pytest.raises(InputError, match="missing"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_that_devices_cannot_share_is_refused(small_config, tmp_path):
    with pytest.raises(InputError, match="batch_size"):
        train(small_config(batch_size=12), tmp_path / "run")


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", b"3", b"[]", b"\xff"]
)
def test_a_config_of_another_shape_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"restore that file|config (must|has no)") as error:
        read_config(tmp_path)
    assert str(error.value).isprintable()


def test_a_folder_without_a_run_is_named_with_the_way_out(tmp_path):
    (tmp_path / "file").touch()
    for workdir in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(InputError, match="give the run's --workdir, or leave --resume out"):
            read_config(workdir)
