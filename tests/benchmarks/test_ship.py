"""benchmarks/ship.py: from a training run and its evaluation to a folder that can be shipped."""

import csv
import dataclasses
import hashlib
import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fetal_flax import checkpoints, presets
from fetal_flax.checkpoints import Checkpoint, Description, TrainingCheckpoints, shipped
from fetal_flax.commands.main import parse
from fetal_flax.config import (
    DataConfig,
    EncoderConfig,
    ModelConfig,
    ScheduleConfig,
    TrainConfig,
    to_dict,
)
from fetal_flax.data import splits
from fetal_flax.data.datasets import open_dataset
from fetal_flax.errors import InputError
from fetal_flax.evaluation.evaluate import evaluate
from fetal_flax.inference.segmenter import Segmenter
from fetal_flax.measurement.ellipse import Ellipse
from fetal_flax.measurement.head import measure_head
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables

pytestmark = pytest.mark.usefixtures("quick_compilation", "empty_charts", "tiny_network_all_along")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> Any:
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("ship")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    return TrainConfig(
        name="tiny",
        model=ModelConfig(name="unet", base_width=4),
        encoder=EncoderConfig(weights="none"),
        data=DataConfig(
            dataset="fetal_phantom",
            cache_dir=str(tmp_path_factory.mktemp("cache")),
            image_size=(32, 32),
            phantom_count=30,
            phantom_size=(64, 96),
        ),
        schedule=ScheduleConfig(epochs=2),
    )


def make_run(workdir: Path, config: TrainConfig, seed: int) -> Path:
    """Leaves what a run of two epochs does, the first of them the best; nothing is trained."""
    dataset = open_dataset(config.data, config.seed)
    sides = splits.split(dataset.names, dataset.examinations, seed=0)
    splits.write_manifest(workdir / "split.json", sides, dataset.names, method={"seed": 0})
    variables = functional.init(config.model, seed)
    metadata = Description("network", config.model, config.data.image_size)
    segmenter = Segmenter(Checkpoint(variables, metadata))
    logits = np.stack(list(segmenter.logits([dataset.record(0).image])))
    # Half of an image is a head.
    variables.params["head/bias"] -= float(np.median(logits))
    saved = TrainingCheckpoints(workdir)
    history = []
    for epoch, dice in enumerate((0.75, 0.5), 1):
        history.append({"epoch": epoch, "validation_dice": dice})
        description = Description(
            "network",
            config.model,
            config.data.image_size,
            config=to_dict(config) | {"pos_weight": 2.5},
            progress={"history": list(history), "begun": []},
        )
        saved.save(epoch, variables, {"step": jnp.int32(epoch)}, description, dice)
        variables.params["head/bias"] += 0.5
    saved.close()
    return workdir


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", config, seed=0)


@pytest.fixture(scope="module")
def evaluation(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    evaluate(run, output=folder, split="validation")
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(
        "from fetal_flax.config import TrainConfig\ndef config(): return TrainConfig(name='tiny')\n"
    )
    return path


@pytest.fixture(scope="module")
def folder(script, run, evaluation, recipe, tmp_path_factory) -> Path:
    """What the script makes."""
    folder = tmp_path_factory.mktemp("networks") / "phantom-tiny"
    flags = ["--workdir", run, "--evaluation", evaluation, "--output", folder, "--config", recipe]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", ["ship.py", *map(str, flags), "--limit-mm", "50"])
        assert script.main() == 0
    return folder


def test_the_runs_best_network_is_shipped_rounded_to_float16(folder, run):
    names = ["MODEL_CARD.md", "description.json", "network.safetensors", "split.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    best, of_run = checkpoints.load_checkpoint(run)
    loaded, description = checkpoints.load_checkpoint(folder)
    for name, array in (best.params | best.batch_stats).items():
        kernel = np.float16 if array.ndim > 1 else np.float32
        stored = (loaded.params | loaded.batch_stats)[name]
        np.testing.assert_array_equal(stored, np.asarray(array, kernel).astype(np.float32))
    assert (description.model, description.image_size) == (of_run.model, (32, 32))
    assert description.progress["history"][0]["epoch"] == 1
    assert description.config is not None and of_run.config is not None
    assert description.config["pos_weight"] == of_run.config["pos_weight"]
    assert description.progress["history"] == of_run.progress["history"][-1:]
    assert (folder / "split.json").read_bytes() == (run / "split.json").read_bytes()


def test_nothing_of_the_machine_is_in_the_folder(folder, run, config):
    for path in folder.iterdir():
        content = path.read_bytes()
        assert str(run.parent).encode() not in content, path
        assert config.data.cache_dir.encode() not in content, path


def test_the_shipped_network_is_evaluated_on_its_own_split(folder, evaluation, tmp_path):
    metrics = evaluate(folder, output=tmp_path / "out", split="validation")
    before = json.loads((evaluation / "metrics.json").read_text())
    assert metrics["n"] == before["n"] == 6
    assert metrics["run"]["epoch"] == before["run"]["epoch"]
    assert metrics["dice"]["mean"] == pytest.approx(before["dice"]["mean"], abs=0.01)


def test_the_card_tells_what_was_measured(folder, evaluation):
    card = (folder / "MODEL_CARD.md").read_text()
    metrics = json.loads((evaluation / "metrics.json").read_text())
    for name in ("dice", "hausdorff_mm", "hc_abs_error_mm"):
        digits = 2 if name.endswith("_mm") else 4
        value = metrics[name]
        low, high = (f"{bound:.{digits}f}" for bound in value["ci95"])
        groups = metrics["by"]["trimester"].values()
        cells = [
            f"{value['mean']:.{digits}f} ± {value['std']:.{digits}f}",
            f"{low} to {high}",
            *(f"{group[name]['mean']:.{digits}f}" for group in groups),
        ]
        assert f"| `{name}` | {' | '.join(cells)} |" in card
    with (evaluation / "per_image.csv").open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: float(row["ellipse_dice"]))
    worst = re.findall(r"^\| (phantom_\d+) \|", card, re.MULTILINE)
    assert worst == [row["name"] for row in rows[:5]]
    digest = hashlib.sha256((folder / "network.safetensors").read_bytes()).hexdigest()
    assert digest in card and "Not a medical device" in card
    assert "6 images of 6 examinations to validate on, of 30" in card
    figures = json.loads((folder / "description.json").read_text())["figures"]
    assert figures["evaluations"][0]["dice"] == metrics["dice"]
    assert f"by at most {figures['float16']['largest_mm']:.4f} mm" in card


def test_the_cards_command_trains_the_same(script, config, recipe):
    odd = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, cache_dir=DataConfig.cache_dir, workers=None),
        augmentation=dataclasses.replace(config.augmentation, enabled=False),
        model=dataclasses.replace(config.model, aspp_width=64),
    )
    command = script.training_command(odd, presets.load_file(recipe), recipe).split()
    assert command[:3] == ["fetal-flax", "train", "--config"]
    parsed = parse("train", ["--config", str(recipe), *command[4:]])
    assert parsed.settings == odd
    preset = presets.FOLDER / "hc18.py"
    command = script.training_command(odd, presets.load("hc18"), preset).split()
    assert command[:3] == ["fetal-flax", "train", "hc18"]
    assert parse("train", command[2:]).settings == odd


class Drawing(Segmenter):
    """Sees an ellipse whose size is the last bias, or nothing if that is 0."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__(checkpoint)
        self.size = float(checkpoint.variables.params["head/bias"][0])

    def segment(self, items, image):
        for number, item in enumerate(items):
            semi_major = self.size + number * (self.size > 20)
            ellipse = Ellipse(48.0, 32.0, semi_major or 1.0, 0.75 * (semi_major or 1.0), 0.3)
            mask = ellipse.filled(*image(item).shape) if semi_major else 0 * image(item)
            yield item, np.where(mask, 9, -9).astype(np.float32)[None]


def test_float16_is_compared_image_by_image(script, run, config, monkeypatch):
    monkeypatch.setattr(script, "Segmenter", Drawing)
    loaded = script.load_run(run)
    dataset = open_dataset(config.data, config.seed)
    indices = splits.read_manifest(run / "split.json", dataset.names).validation

    def of_size(size: float) -> Any:
        params = loaded.variables.params | {"head/bias": jnp.full(1, size)}
        return loaded._replace(variables=Variables(params, loaded.variables.batch_stats))

    def circumference(size: float, index: int) -> float:
        record = dataset.record(index)
        mask = Ellipse(48.0, 32.0, size, 0.75 * size, 0.3).filled(*record.image.shape) > 0
        head = measure_head(mask, outline_px=0.0)
        assert head is not None
        return head.in_mm(record.pixel_size_mm).circumference

    before = of_size(20.0)
    same = script.compare(before, before.variables, dataset, indices)
    assert (same.images, same.largest_mm, same.lowest_dice, same.largest_weight) == (6, 0, 1, 0)
    # The other draws each head a pixel larger than the one before.
    other = script.compare(before, of_size(21.0).variables, dataset, indices)
    changes = [
        circumference(21.0 + number, index) - circumference(20.0, index)
        for number, index in enumerate(indices)
    ]
    assert other.largest_mm == max(changes) and other.mean_mm == pytest.approx(np.mean(changes))
    assert other.image == dataset.names[indices[int(np.argmax(changes))]]
    assert 0.5 < other.lowest_dice < 0.95
    assert other.array == "head/bias" and other.largest_weight == pytest.approx(0.05)
    # A head that is lost counts with its whole circumference.
    lost = script.compare(before, of_size(0.0).variables, dataset, indices)
    assert lost.largest_mm == max(circumference(20.0, index) for index in indices)
    assert lost.lowest_dice == 0


def test_an_encoder_that_float16_changes_too_much_stays_float32(script, monkeypatch):
    model = ModelConfig(name="mobilenet_unet")
    variables = functional.init(model, 0)
    run = script.Run(variables, Description("network", model), TrainConfig(model=model), 1)
    changes: list[float] = []

    def compare(run: Any, other: Variables, *_: Any) -> Any:
        """The second time, only what is not the encoder may differ."""
        pairs = zip(jax.tree.leaves(run.variables), jax.tree.leaves(other), strict=True)
        assert not all(np.array_equal(*pair) for pair in pairs)
        encoders = [functional.encoder_part(v).params for v in (run.variables, other)]
        rounded = any(not np.array_equal(a, encoders[1][n]) for n, a in encoders[0].items())
        changes.append(0.4 if rounded else 0.02)
        return script.Float16(9, changes[-1], "a", None, 0.01, 0.99, 0.0005, "x", "cpu", "today")

    monkeypatch.setattr(script, "compare", compare)
    arrays, float16 = script.round_weights(run, None, (), 0.05)
    assert changes == [0.4, 0.02] == [float16.with_encoder_mm, float16.largest_mm]
    kernels = {name: array.dtype for name, array in arrays.items() if array.ndim > 1}
    of_encoder = {name.startswith("encoder/"): dtype for name, dtype in kernels.items()}
    assert of_encoder == {True: np.float32, False: np.float16}
    assert "stay float32: as float16 they would change it by up to 0.4000 mm" in (
        script.float16_sentence(float16)
    )
    arrays, float16 = script.round_weights(run, None, (), 0.5)
    assert float16.with_encoder_mm is None
    assert {a.dtype for a in arrays.values() if a.ndim > 1} == {np.dtype(np.float16)}
    with pytest.raises(InputError, match=r"More than 0\.01 mm can't be shipped"):
        script.round_weights(run, None, (), 0.01)


def refused(script, *arguments: Path, **options: Any) -> str:
    """Runs the script where it must refuse, and returns why."""
    before = sorted(arguments[-1].parent.iterdir())
    with pytest.raises(InputError) as error:
        script.ship(arguments[0], [arguments[1]], arguments[2], **options)
    assert sorted(arguments[-1].parent.iterdir()) == before
    return str(error.value)


def test_too_large_a_change_is_not_shipped(script, run, evaluation, recipe, tmp_path):
    message = refused(script, run, evaluation, tmp_path / "x", recipe=recipe, limit_mm=-1.0)
    assert "change the circumference by at most" in message and "--limit-mm" in message


def test_an_evaluation_of_images_that_it_was_trained_with_is_refused(script, run, recipe, tmp_path):
    evaluate(run, output=tmp_path / "all", split="all")
    message = refused(script, run, tmp_path / "all", tmp_path / "x", recipe=recipe)
    assert "24 images that the run was trained with" in message


def test_an_evaluation_of_another_network_is_refused(script, run, evaluation, recipe, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(evaluation, other)
    metrics = json.loads((other / "metrics.json").read_text())
    metrics["run"]["epoch"] += 1
    (other / "metrics.json").write_text(json.dumps(metrics))
    assert "epoch differs" in refused(script, run, other, tmp_path / "x", recipe=recipe)
    (other / "metrics.json").write_text("{}")
    assert "can't be read" in refused(script, run, other, tmp_path / "x", recipe=recipe)


def test_what_was_not_trained_here_is_refused(script, run, evaluation, folder, recipe, tmp_path):
    variables, description = checkpoints.load_checkpoint(run)
    plain = dataclasses.replace(description, config=None, progress={"source": "a.pth"})
    checkpoints.save_checkpoint(tmp_path / "converted", Checkpoint(variables, plain))
    assert "is no training run" in refused(
        script, tmp_path / "converted", evaluation, tmp_path / "x", recipe=recipe
    )
    with pytest.raises(InputError, match=r"phantom-tiny exists"):
        script.ship(run, [evaluation], folder, recipe=recipe)
    assert "--config" in refused(script, run, evaluation, tmp_path / "x")


def test_of_a_run_on_all_images_the_last_network_is_shipped_and_the_card_says_so(
    script, run, evaluation, config, recipe, tmp_path
):
    everything = make_run(tmp_path / "all", dataclasses.replace(config, seed=1), seed=2)
    output = tmp_path / "phantom-tiny"
    options = {"recipe": recipe, "trained_on_all": everything, "limit_mm": 50.0}
    assert "trained on 24 of 30 images" in refused(script, run, evaluation, output, **options)

    manifest = json.loads((everything / "split.json").read_text())
    manifest |= {"train": manifest["train"] + manifest["validation"], "validation": []}
    (everything / "split.json").write_text(json.dumps(manifest))
    script.ship(run, [evaluation], output, **options)
    last, _ = checkpoints.load_checkpoint(everything, last=True)
    loaded, description = checkpoints.load_checkpoint(output)
    bias = np.asarray(last.params["head/bias"], np.float16)
    assert np.array_equal(np.asarray(loaded.params["head/bias"], np.float16), bias)
    assert description.progress["history"][0]["epoch"] == 2
    card = (output / shipped.CARD).read_text()
    assert "**This network was trained on all 30 images.**" in card
    assert "`seed` 1 for 0" in card
    assert not (output / shipped.SPLIT).exists()
    with pytest.raises(InputError, match="trained on all images and left none out"):
        evaluate(output, output=tmp_path / "out", split="validation")
