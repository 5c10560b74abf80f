"""A run from its config to its workdir: what it leaves behind, and what stopping it costs."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from fetal_flax import checkpoints
from fetal_flax.config import (
    DataConfig,
    EncoderConfig,
    ModelConfig,
    ScheduleConfig,
    TrainConfig,
    to_dict,
)
from fetal_flax.errors import InputError
from fetal_flax.models import functional
from fetal_flax.training import loop

ROOT = Path(__file__).parents[2]
TIMINGS = {"seconds", "images_per_second", "waiting"}


def small_config(cache_dir: Path, **schedule) -> TrainConfig:
    return TrainConfig(
        name="small",
        model=ModelConfig(name="unet", base_width=4),
        encoder=EncoderConfig(weights="none"),
        data=DataConfig(
            dataset="fetal_phantom",
            cache_dir=str(cache_dir),
            image_size=(32, 32),
            phantom_count=45,
            phantom_size=(64, 96),
            workers=0,
        ),
        schedule=ScheduleConfig(**{"epochs": 2, "batch_size": 8} | schedule),
    )


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(cache_dir, tmp_path_factory):
    return loop.train(
        small_config(cache_dir), tmp_path_factory.mktemp("runs") / "finished", profile=True
    )


def rows(workdir: Path) -> list[dict[str, str]]:
    with (workdir / "metrics.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if name not in TIMINGS}
            for row in csv.DictReader(file)
        ]


def test_a_run_leaves_config_split_metrics_pictures_and_logs(finished, cache_dir):
    assert loop.read_config(finished) == small_config(cache_dir)
    split = json.loads((finished / "split.json").read_text())
    assert not set(split["train"]) & set(split["validation"])
    assert len(split["train"]) + len(split["validation"]) == 45
    assert [row["epoch"] for row in rows(finished)] == ["1", "2"]
    assert json.loads((finished / "run.json").read_text())["pos_weight"] > 1
    for picture in ("curves.png", "validation.png"):
        assert cv2.imread(str(finished / picture)) is not None
    assert list((finished / "tensorboard").glob("events*"))
    assert list((finished / "profile").rglob("*.xplane.pb"))


def test_the_best_checkpoint_describes_itself(finished):
    variables, description = checkpoints.load(finished)
    assert description.model == ModelConfig(name="unet", base_width=4)
    assert description.image_size == (32, 32)
    assert variables.params.keys() == functional.shapes(description.model).params.keys()
    dices = [float(row["validation_dice"]) for row in rows(finished)]
    assert description.progress["history"][-1]["validation_dice"] == max(dices)


def test_validation_counts_every_image_once(finished, cache_dir):
    config = small_config(cache_dir)
    run = loop.prepare(config)
    assert len(run.split.validation) % config.schedule.batch_size, "no padding would be tested"
    variables, _ = checkpoints.load(finished)
    whole = loop.evaluate(run, variables)
    singly = [
        loop.evaluate(
            dataclasses.replace(run, split=dataclasses.replace(run.split, validation=(index,))),
            variables,
        )
        for index in run.split.validation
    ]
    for name, value in whole.items():
        assert value == pytest.approx(np.mean([one[name] for one in singly]), rel=1e-5)


def test_resuming_goes_on_exactly(finished, cache_dir, tmp_path):
    loop.train(small_config(cache_dir, epochs=1), tmp_path / "run")
    loop.train(small_config(cache_dir, epochs=2), tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == rows(finished)
    for ours, theirs in zip(
        checkpoints.load(tmp_path / "run")[0], checkpoints.load(finished)[0], strict=True
    ):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])


def on_device(config: TrainConfig, **data) -> TrainConfig:
    changed = dataclasses.replace(config.data, backend="device", **data)
    return dataclasses.replace(config, data=changed)


@pytest.mark.slow
def test_the_devices_own_batches_train_as_the_hosts_do(finished, cache_dir, tmp_path):
    """Steps by ones and twos; the warp is a grey level off here and there."""
    for steps in (1, 2):
        config = on_device(small_config(cache_dir), steps_per_dispatch=steps)
        workdir = loop.train(config, tmp_path / str(steps))
        for ours, theirs in zip(rows(workdir), rows(finished), strict=True):
            for name in theirs:
                assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=2e-3), name
    events = list((tmp_path / "2" / "tensorboard").glob("events*"))
    assert len(events) == 1 and events[0].stat().st_size > 0


@pytest.mark.slow
def test_resuming_on_the_devices_own_batches_is_exact(cache_dir, tmp_path):
    undisturbed = loop.train(
        on_device(small_config(cache_dir), steps_per_dispatch=4), tmp_path / "undisturbed"
    )
    config = on_device(small_config(cache_dir, epochs=1), steps_per_dispatch=4)
    loop.train(config, tmp_path / "run")
    config = on_device(small_config(cache_dir, epochs=2), steps_per_dispatch=4)
    loop.train(config, tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == rows(undisturbed)


def test_early_stopping_ends_a_run(cache_dir, tmp_path):
    # A rate of nearly nothing cannot improve for long.
    config = small_config(cache_dir, epochs=30, early_stopping_patience=1)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-30)
    workdir = loop.train(dataclasses.replace(config, optimizer=optimizer), tmp_path / "run")
    assert len(rows(workdir)) < 30


def test_a_workdir_is_never_overwritten(finished, cache_dir):
    before = (finished / "metrics.csv").read_bytes()
    with pytest.raises(InputError, match="--resume"):
        loop.train(small_config(cache_dir), finished)
    assert (finished / "metrics.csv").read_bytes() == before


def test_resuming_with_another_config_is_refused(finished, cache_dir):
    config = small_config(cache_dir)
    other = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-2)
    )
    with pytest.raises(InputError, match=r"optimizer\.learning_rate"):
        loop.train(other, finished, resume=True)


def test_resuming_with_other_data_is_refused(cache_dir, tmp_path):
    workdir = loop.train(small_config(cache_dir, epochs=1), tmp_path / "run")
    manifest = json.loads((workdir / "split.json").read_text())
    manifest["train"].pop()
    (workdir / "split.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="split"):
        loop.train(small_config(cache_dir), workdir, resume=True)


def test_resuming_nothing_is_refused(cache_dir, tmp_path):
    with pytest.raises(InputError, match="no run"):
        loop.train(small_config(cache_dir), tmp_path / "nothing", resume=True)


def test_a_missing_encoder_stops_before_anything_is_written(cache_dir, tmp_path):
    config = dataclasses.replace(
        small_config(cache_dir),
        model=ModelConfig(),
        encoder=EncoderConfig(weights=str(tmp_path / "missing.pth")),
    )
    with pytest.raises(InputError, match="missing"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_that_devices_cannot_share_is_refused(cache_dir, tmp_path):
    with pytest.raises(InputError, match="batch_size"):
        loop.train(small_config(cache_dir, batch_size=12), tmp_path / "run")


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one(cache_dir, tmp_path):
    config = small_config(cache_dir, epochs=4)
    undisturbed = loop.train(config, tmp_path / "undisturbed")

    workdir = tmp_path / "killed"
    path = tmp_path / "config.py"
    path.write_text(
        "from fetal_flax.config import TrainConfig, from_dict\n"
        f"def config(): return from_dict(TrainConfig, {to_dict(config)!r})\n"
    )
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(path)]
    command += ["--workdir", str(workdir)]
    # The same devices as this process has: another topology may round differently.
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    while not (workdir / "metrics.csv").exists():
        assert process.poll() is None, "the run ended before its first epoch"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(rows(workdir)) < 4

    subprocess.run([*command, "--resume"], check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert rows(workdir) == rows(undisturbed)
    for ours, theirs in zip(
        checkpoints.load(workdir)[0], checkpoints.load(undisturbed)[0], strict=True
    ):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", b"3", b"[]", b"\xff"]
)
def test_a_config_of_another_shape_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"holds no run to resume|config (must|has no)") as error:
        loop.read_config(tmp_path)
    assert str(error.value).isprintable()
