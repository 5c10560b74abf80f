"""Cross-validation: every image is held out once, and what is done is not done again."""

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fetal_flax.commands.main import parse
from fetal_flax.config import TrainConfig
from fetal_flax.errors import InputError
from fetal_flax.evaluation.cross_validation import cross_validate, with_fold
from fetal_flax.evaluation.evaluate import evaluate
from fetal_flax.training.run import train

COUNT, FOLDS = 20, 2


@pytest.fixture(scope="module")
def folds_config(small_config) -> Callable[..., TrainConfig]:
    def make(batch_size: int = 8) -> TrainConfig:
        config = small_config(epochs=1, batch_size=batch_size)
        data = dataclasses.replace(config.data, folds=FOLDS, phantom_count=COUNT)
        return dataclasses.replace(config, data=data)

    return make


@pytest.fixture(scope="module")
def finished(folds_config, tmp_path_factory) -> tuple[TrainConfig, Path]:
    """The second fold is trained first and alone, as another machine would."""
    config = folds_config()
    workdir = tmp_path_factory.mktemp("runs") / "small-folds"
    train(with_fold(config, 1), workdir / "fold-1")
    trained = (workdir / "fold-1" / "metrics.csv").read_bytes()
    cross_validate(config, workdir)
    assert (workdir / "fold-1" / "metrics.csv").read_bytes() == trained
    return config, workdir


def rows(workdir: Path) -> list[dict[str, str]]:
    with (workdir / "per_image.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_image_is_held_out_once(finished):
    _, workdir = finished
    held_out = rows(workdir)
    assert len({row["name"] for row in held_out}) == len(held_out) == COUNT
    assert {row["fold"] for row in held_out} == {"0", "1"}
    for fold in range(FOLDS):
        split = json.loads((workdir / f"fold-{fold}" / "split.json").read_text())
        assert {row["name"] for row in held_out if row["fold"] == str(fold)} == set(
            split["validation"]
        )
    assert len(list((workdir / "masks").iterdir())) == COUNT


@pytest.mark.slow
def test_the_report_is_that_of_the_folds_together(finished, tmp_path):
    _, workdir = finished
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert metrics["n"] == COUNT and metrics["run"]["split"] == "each of 2 folds"
    assert metrics["run"]["epoch"] == [1, 1] and metrics["run"]["checkpoint"] == str(workdir)
    for fold in range(FOLDS):
        alone = evaluate(workdir / f"fold-{fold}", output=tmp_path / str(fold), split="validation")
        for name in ("dice", "ellipse_dice", "ellipse_hausdorff_mm"):
            assert metrics["by"]["fold"][str(fold)][name] == alone[name]
        for row in rows(tmp_path / str(fold)):
            name = f"{row['name']}.png"
            assert (workdir / "masks" / name).read_bytes() == (
                tmp_path / str(fold) / "masks" / name
            ).read_bytes()
    page = (workdir / "report.html").read_text()
    assert "<h2>By fold</h2>" in page and page.count("Loss, Dice and learning rate") == FOLDS


@pytest.mark.slow
def test_a_fold_that_is_missing_is_trained_and_the_others_are_left(finished, tmp_path):
    config, workdir = finished
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "fold-0")
    before = (workdir / "metrics.json").read_text()
    kept = (copy / "fold-1" / "checkpoints").stat().st_mtime_ns
    cross_validate(config, copy)
    again = json.loads((copy / "metrics.json").read_text())
    expected = json.loads(before)
    assert again["dice"] == expected["dice"] and again["by"] == expected["by"]
    assert (copy / "fold-1" / "checkpoints").stat().st_mtime_ns == kept


@pytest.mark.slow
def test_folds_of_another_config_are_refused(finished, folds_config):
    _, workdir = finished
    other = folds_config(batch_size=4)
    before = (workdir / "metrics.json").read_bytes()
    with pytest.raises(InputError, match=r"schedule\.batch_size"):
        cross_validate(other, workdir)
    assert (workdir / "metrics.json").read_bytes() == before


def test_the_flag_fold_takes_five_unless_the_config_says_otherwise(folds_config):
    config = folds_config()
    assert (with_fold(config, 1).data.folds, with_fold(config, 1).data.fold) == (2, 1)
    assert with_fold(TrainConfig(), 4).data.folds == 5
    for settings, fold in ((config, 2), (TrainConfig(), 5), (config, -1)):
        with pytest.raises(InputError, match=r"data\.fold must be"):
            with_fold(settings, fold)
    command = parse("cross-validate", ["--data.folds", "4"])
    assert command.settings.data.folds == 4 and command.settings.name == "phantom"
