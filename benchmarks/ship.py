"""Makes a folder of a trained network that the package can ship; measures what float16 costs.

    fetal-flax evaluate --checkpoint runs/hc18 --data-dir HC18 --split validation --output figures
    python benchmarks/ship.py --workdir runs/hc18 --evaluation figures --data-dir HC18 \
        --output fetal_flax/networks/hc18-described

Writes `network.safetensors`, `description.json`, `split.json` and `MODEL_CARD.md`, all of
them or none; docs/networks.md has more. Everything that the card says is read from the run, its
evaluations and the measurement. With `--trained-on-all RUN` the network is that run's last, trained
on all images by the same recipe, and the figures are still those of the run on the split.
"""

import argparse
import csv
import dataclasses
import datetime
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
from model_card import Evaluation, Facts, Float16, Run, card, differences, float16_sentence

from fetal_flax import checkpoints, presets
from fetal_flax.checkpoints import Checkpoint, shipped
from fetal_flax.config import DataConfig, TrainConfig, from_dict, to_dict
from fetal_flax.data import splits
from fetal_flax.data.datasets import Dataset, open_dataset
from fetal_flax.errors import InputError
from fetal_flax.inference.segmenter import Segmenter
from fetal_flax.measurement.overlap import segmentation_metrics
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables
from fetal_flax.performance.machine import device_name


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="the training run on the split")
    parser.add_argument(
        "--evaluation",
        type=Path,
        action="append",
        required=True,
        help="its evaluation, on images that it was not trained with; may be given several times",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--data-dir", type=Path, help="HC18 folder; else what the run was given")
    parser.add_argument("--config", type=Path, help="the recipe; else the preset of the run's name")
    parser.add_argument("--trained-on-all", type=Path, help="the run whose network is shipped")
    parser.add_argument("--note", default="", help="a sentence for the card's recipe")
    parser.add_argument("--limit-mm", type=float, default=0.05, help="most that float16 may change")
    options = parser.parse_args()
    absl.logging.set_verbosity(absl.logging.FATAL)  # As the command line sets it.
    try:
        float16 = ship(
            options.workdir,
            options.evaluation,
            options.output,
            data_dir=options.data_dir,
            recipe=options.config,
            trained_on_all=options.trained_on_all,
            note=options.note,
            limit_mm=options.limit_mm,
        )
    except InputError as error:
        print(f"ship.py: {error}", file=sys.stderr)
        return error.exit_code
    print(float16_sentence(float16))
    print(f"{', '.join(sorted(path.name for path in options.output.iterdir()))} are in", end=" ")
    print(options.output)
    return 0


def ship(
    workdir: Path,
    evaluations: Sequence[Path],
    output: Path,
    *,
    data_dir: Path | None = None,
    recipe: Path | None = None,
    trained_on_all: Path | None = None,
    note: str = "",
    limit_mm: float = 0.05,
) -> Float16:
    """Makes the folder `output`; the arguments are the script's.

    Raises:
        InputError: A run or an evaluation can't be read, or they don't belong together; an
            evaluation has images that the run was trained with; float16 can't hold the weights, or
            changes a circumference by more than `limit_mm`; or `output` exists.
    """
    if output.exists():
        raise InputError(f"{output} exists: remove it, or choose another --output")
    measured = load_run(workdir)
    run = measured if trained_on_all is None else load_run(trained_on_all, last=True)
    data = from_dict(DataConfig, (measured.description.config or {})["data"], path="data")
    if data_dir is not None:
        data = dataclasses.replace(data, data_dir=str(data_dir))
    dataset = open_dataset(data, measured.config.seed)
    sides = splits.read_manifest(workdir / shipped.SPLIT, dataset.names)
    if trained_on_all is not None:
        _check_trained_on_all(run, measured, trained_on_all, dataset)
    trained_with = {dataset.names[index] for index in sides.train}
    read = [read_evaluation(folder, measured, trained_with) for folder in evaluations]
    recipe = recipe or presets.FOLDER / f"{measured.config.name}.py"
    training = training_command(measured.config, presets.load_file(recipe), recipe)

    arrays, float16 = round_weights(run, dataset, sides.validation, limit_mm)
    figures = {
        "evaluations": [_without_paths(evaluation.metrics) for evaluation in read],
        "float16": float16._asdict(),
    }
    trained_on = shipped.A_SPLIT if trained_on_all is None else shipped.ALL_IMAGES
    description = dataclasses.replace(
        run.description,
        config=portable(run.description.config or {}),
        progress={
            "history": run.description.progress["history"][-1:],
            shipped.TRAINED_ON: trained_on,
        },
    )
    files = shipped.contents(arrays, description, figures)
    facts = Facts(
        output.name, run, measured, dataset, sides, read, float16, training, note, trained_on, files
    )
    files[shipped.CARD] = card(facts).encode()
    if trained_on_all is None:
        files[shipped.SPLIT] = (workdir / shipped.SPLIT).read_bytes()
    shipped.save(output, files)
    return float16


def load_run(workdir: Path, *, last: bool = False) -> Run:
    """Returns a run's best network, or its last.

    Raises:
        InputError: It can't be read, was not trained here, or stands in the middle of an epoch.
    """
    variables, description = checkpoints.load_checkpoint(workdir, last=last)
    history = description.progress.get("history")
    if description.config is None or not history:
        raise InputError(f"{workdir} is no training run: give one's workdir")
    if description.progress.get("begun"):
        raise InputError(f"{workdir} was interrupted in an epoch: go on with --resume first")
    config = portable(description.config)
    del config["pos_weight"]  # What `auto` came to.
    return Run(variables, description, from_dict(TrainConfig, config), history[-1]["epoch"])


def _check_trained_on_all(run: Run, measured: Run, workdir: Path, dataset: Dataset) -> None:
    same = (run.config.model, run.description.image_size)
    if same != (measured.config.model, measured.description.image_size):
        raise InputError(f"{workdir} trained another network than the run on the split")
    if run.epoch != run.config.schedule.epochs:
        raise InputError(
            f"{workdir} ended after {run.epoch} of {run.config.schedule.epochs} epochs: the recipe "
            "is fixed, so train all of them"
        )
    trained = splits.read_manifest(workdir / shipped.SPLIT, dataset.names).train
    if len(trained) != len(dataset):
        raise InputError(
            f"{workdir} was trained on {len(trained)} of {len(dataset)} images: train on all, or "
            "ship the run on the split"
        )


def read_evaluation(folder: Path, run: Run, trained_with: set[str]) -> Evaluation:
    """Reads an evaluation of a run's best network.

    Raises:
        InputError: It can't be read, is of another network, or has images of the training side.
    """
    path = folder / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        with (folder / "per_image.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        evaluated = metrics["run"]
        of_run = {
            "model": to_dict(run.config.model),
            "image_size": list(run.description.image_size),
            "epoch": run.epoch,
        }
        differing = [name for name in of_run if evaluated[name] != of_run[name]]
        names = {row["name"] for row in rows}
        day = datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} can't be read as an evaluation ({error})") from None
    if differing:
        raise InputError(
            f"{folder} is of another network ({differing[0]} differs): evaluate the run again"
        )
    if known := sorted(names & trained_with):
        raise InputError(
            f"{folder} has {len(known)} images that the run was trained with, such as {known[0]}: "
            "evaluate it with --split validation, or on other images"
        )
    return Evaluation(metrics, rows, day)


def round_weights(
    run: Run, dataset: Dataset, indices: Sequence[int], limit_mm: float
) -> tuple[dict[str, np.ndarray], Float16]:
    """Returns the arrays to store, float16 but for an encoder that has to stay, and what it costs.

    Raises:
        InputError: float16 can't hold the weights, or changes a circumference by more than
            `limit_mm`.
    """

    def attempt(*, encoder: bool) -> tuple[dict[str, np.ndarray], Float16]:
        arrays = shipped.to_float16(run.variables, encoder=encoder)
        return arrays, compare(run, shipped.to_float32(arrays, run.variables), dataset, indices)

    arrays, float16 = attempt(encoder=True)
    if float16.largest_mm > limit_mm and functional.encoder_part(run.variables).params:
        with_encoder_mm = float16.largest_mm
        arrays, float16 = attempt(encoder=False)
        float16 = float16._replace(with_encoder_mm=with_encoder_mm)
    if float16.largest_mm > limit_mm:
        raise InputError(
            f"{float16_sentence(float16)} More than {limit_mm:g} mm can't be shipped: look at "
            "that image, or raise --limit-mm"
        )
    return arrays, float16


def compare(run: Run, rounded: Variables, dataset: Dataset, indices: Sequence[int]) -> Float16:
    """Measures what another set of weights, those of float16, changes on images.

    A head that only one of both finds counts with its whole circumference.
    """
    measured = [
        Segmenter(Checkpoint(variables, run.description)).measure_each(
            map(dataset.record, indices),
            lambda record: record.image,
            lambda record: record.pixel_size_mm,
        )
        for variables in (run.variables, rounded)
    ]
    changes, dices = {}, []
    for (record, whole), (_, half) in zip(*measured, strict=True):
        changes[record.name] = abs((whole.hc_mm or 0.0) - (half.hc_mm or 0.0))
        dices.append(segmentation_metrics(whole.mask, half.mask)["dice"])
    weights = {}
    for before, after in zip(run.variables, rounded, strict=True):
        for name, array in before.items():
            largest = float(np.abs(array).max())
            change = float(np.abs(np.asarray(array) - np.asarray(after[name])).max())
            weights[name] = change / largest if largest else 0.0
    image, array = (max(values, key=values.__getitem__) for values in (changes, weights))
    return Float16(
        images=len(changes),
        largest_mm=changes[image],
        image=image,
        with_encoder_mm=None,
        mean_mm=float(np.mean(list(changes.values()))),
        lowest_dice=float(min(dices)),
        largest_weight=weights[array],
        array=array,
        machine=f"{device_name()}, jax {jax.__version__}",
        date=datetime.date.today().isoformat(),
    )


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a run's config without the paths of the machine that it ran on."""

    def without_folders(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: without_folders(part) for name, part in value.items()}
        return Path(value).name if isinstance(value, str) and "/" in value else value

    result = without_folders(config)
    result["data"] |= {"data_dir": None, "cache_dir": DataConfig.cache_dir}
    return result


def training_command(config: TrainConfig, recipe: TrainConfig, path: Path) -> str:
    """Returns the command that trains `config`, from the recipe in a file."""
    is_preset = path.parent.samefile(presets.FOLDER)
    source = [path.stem] if is_preset else ["--config", f"{path.parent.name}/{path.name}"]
    words = ["fetal-flax", "train", *source]
    for name, (value, _) in differences(config, recipe).items():
        section, _, field = name.replace("_", "-").rpartition(".")
        prefix = f"--{section}." if section else "--"
        if isinstance(value, bool):
            words.append(prefix + "no-" * (not value) + field)
        else:
            parts = value if isinstance(value, (list, tuple)) else [value]
            words += [prefix + field, *map(str, parts)]
    return shlex.join(words)


def _without_paths(metrics: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("epoch", "split", "dataset", "image_size", "tta", "outline_px", "missed")
    return {**metrics, "run": {name: metrics["run"][name] for name in kept}}


if __name__ == "__main__":
    sys.exit(main())
