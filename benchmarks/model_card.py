"""The model card of a network that is shipped, as Markdown, from what `ship.py` has read."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from fetal_flax.checkpoints import Description, shipped
from fetal_flax.config import TrainConfig, to_dict
from fetal_flax.data import splits
from fetal_flax.data.datasets import Dataset
from fetal_flax.models.functional import Variables

WORST_CASES = 5


class Run(NamedTuple):
    """A training run's network, and where it comes from."""

    variables: Variables
    description: Description
    config: TrainConfig
    """Without the paths of the machine that it ran on."""
    epoch: int


class Evaluation(NamedTuple):
    """What `fetal-flax evaluate` left in a folder."""

    metrics: dict[str, Any]
    rows: list[dict[str, str]]
    date: str


class Float16(NamedTuple):
    """What rounding the weights to float16 changes."""

    images: int
    largest_mm: float
    """Largest change of a circumference."""
    image: str
    """Where that is."""
    with_encoder_mm: float | None
    """What it would be with the encoder's weights as float16 too, where they stay float32."""
    mean_mm: float
    lowest_dice: float
    """Between the masks of both."""
    largest_weight: float
    """Largest change of a weight, as a share of the largest in its array."""
    array: str
    machine: str
    date: str


class Facts(NamedTuple):
    """All that the card tells."""

    name: str
    run: Run
    """Of the network that is shipped."""
    measured: Run
    """On the split."""
    dataset: Dataset
    sides: splits.Split
    evaluations: Sequence[Evaluation]
    float16: Float16
    training: str
    note: str
    trained_on: str
    files: Mapping[str, bytes]


def differences(config: TrainConfig, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Returns the settings that differ, with both values."""
    ours, theirs = (flatten_dict(to_dict(c), sep=".") for c in (config, other))
    return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


_HC18 = """\
HC18: two-dimensional ultrasound images of fetal heads with outlines drawn by a trained
sonographer (T. L. A. van den Heuvel, D. de Bruijn, C. L. de Korte, B. van Ginneken: "Automated
measurement of fetal head circumference using 2D ultrasound images", PLOS ONE 13(8), 2018; Zenodo
record 1327317, https://zenodo.org/records/1327317, [CC BY
4.0](https://creativecommons.org/licenses/by/4.0/)). Outlines were filled, and images resized and
varied at random, to train on them; no image is in this folder."""
_PHANTOMS = """\
Procedural ultrasound phantoms of this project: drawn, not scanned. What is measured on them says
nothing of heads."""
_LICENCE_OF_DATA = {
    "hc18": """\
The weights were computed from HC18's images. Whether that makes them an adaptation of these is not
settled; as if it did, they are given under [CC BY
4.0](https://creativecommons.org/licenses/by/4.0/): name the data set's authors, as above, and this
project, and say what you changed.""",
    "fetal_phantom": "The weights are given under this project's licence, Apache-2.0.",
}
_LICENCE_OF_ENCODER = """\
The encoder began with torchvision's MobileNetV2, whose notice (BSD 3-Clause) is in
`LICENSE.torchvision` of the folder `fetal_flax/networks` and has to stay with the weights. It was
trained on ImageNet, whose own terms are for non-commercial research; whether they bind weights is
not settled either, and nobody here can promise that they don't."""
_USE = """\
For research. Not a medical device: it must not be used to diagnose, to treat or to decide about
care. It knows the standard plane, on one hospital's machines, and may draw a head where there is
none. What it measures has to be looked at by someone who can judge it."""


def card(facts: Facts) -> str:
    """Returns the model card, as Markdown."""
    parts = [
        f"# {facts.name}",
        _summary(facts),
        f"## Use\n\n{_USE}",
        f"## Data\n\n{_data(facts)}",
        f"## Recipe\n\n{_recipe(facts)}",
        f"## Figures\n\n{_figures(facts)}",
        f"## How it fails\n\n{_failures(facts.evaluations[0])}",
        f"## float16\n\n{float16_sentence(facts.float16)} {_weights_sentence(facts.float16)}",
        f"## Licence\n\n{_licence(facts)}",
        f"## Files\n\n{_files(facts)}",
    ]
    return "\n\n".join(parts) + "\n"


def _summary(facts: Facts) -> str:
    arrays = facts.run.variables
    count = sum(array.size for array in arrays.params.values())
    height, width = facts.run.description.image_size
    return (
        f"`{facts.run.config.model.title}`, {count:,} parameters, for images of {height}×{width} "
        f"(others are resized). Segments the fetal head; its ellipse gives the circumference.\n\n"
        f"    fetal-flax predict --checkpoint {facts.name} --input scan.png --pixel-size 0.12 "
        "--output out"
    )


def _data(facts: Facts) -> str:
    dataset, sides = facts.dataset, facts.sides
    origin = _HC18 if facts.run.description.dataset == "hc18" else _PHANTOMS
    counts = [
        f"{len(side)} images of {len({dataset.examinations[index] for index in side})} examinations"
        for side in (sides.train, sides.validation)
    ]
    split = (
        f"The split, by examination: {counts[0]} to train on and {counts[1]} to validate on, of "
        f"{len(dataset)} that were at hand."
    )
    if facts.trained_on == shipped.ALL_IMAGES:
        end = (
            f"**This network was trained on all {len(dataset)} images.** The figures below are of "
            "another one, trained by the same recipe on one side of the split and measured on "
            "images of the other; on what this one was trained with, no figure would mean anything."
        )
    else:
        end = (
            "`split.json` names them, and `fetal-flax evaluate --split validation` takes them. The "
            "epoch that validated best was kept, which flatters the figures a little."
        )
    return f"{origin}\n\n{split} {end}"


def _recipe(facts: Facts) -> str:
    run = facts.run
    epochs = run.config.schedule.epochs
    history = run.description.progress["history"][-1]
    lines = [f"    {facts.training}\n"]
    if facts.trained_on == shipped.ALL_IMAGES:
        lines.append(f"The network is that of the last epoch, {run.epoch}.")
        lines.append(f"That of the split's run is of epoch {facts.measured.epoch}.")
        changed = differences(run.config, facts.measured.config).items()
        if changed:
            told = ", ".join(
                f"`{name}` {ours!r} for {theirs!r}" for name, (ours, theirs) in changed
            )
            lines.append(f"Set otherwise than in the split's run, whose command this is: {told}.")
    else:
        lines.append(f"The network is that of epoch {run.epoch} of at most {epochs}")
        lines.append(f"(validation Dice {history['validation_dice']:.4f} at the network's size).")
    if facts.note:
        lines.append(facts.note)
    lines.append("Settings that are not the defaults (`description.json` has all):\n")
    lines += ["| setting | value | default |", "|---|---|---|"]
    for name, (value, default) in differences(run.config, TrainConfig()).items():
        lines.append(f"| `{name}` | {value} | {default} |")
    return "\n".join(lines)


def _figures(facts: Facts) -> str:
    parts = [
        "Per image at native size; an interval is the mean's 95 % bootstrap interval. "
        "docs/measurement.md says what each figure is, and where trimesters begin; a head that "
        "was missed counts with the worst value."
    ]
    for evaluation in facts.evaluations:
        metrics, run = evaluation.metrics, evaluation.metrics["run"]
        groups = metrics["by"].get("trimester", {})
        flags = f" --tta {run['tta']}" * (run["tta"] != "none")
        parts.append(
            f"{metrics['n']} images, `fetal-flax evaluate --split {run['split']}{flags}`, "
            f"{evaluation.date}; "
            f"{len(run['missed'])} heads missed."
        )
        heads = [f"trimester {name} (n = {group['n']})" for name, group in groups.items()]
        table = [
            f"| {' | '.join(['', 'mean ± deviation', 'interval', *heads])} |",
            f"|---|{'--:|' * (2 + len(heads))}",
        ]
        for name in metrics:
            if name in ("n", "by", "run"):
                continue
            value = metrics[name]
            low, high = (_number(name, bound) for bound in value["ci95"])
            cells = [
                f"`{name}`",
                f"{_number(name, value['mean'])} ± {_number(name, value['std'])}",
                f"{low} to {high}",
                *(_number(name, group[name]["mean"]) for group in groups.values()),
            ]
            table.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(table))
    return "\n\n".join(parts)


def _failures(evaluation: Evaluation) -> str:
    rows, missed = evaluation.rows, evaluation.metrics["run"]["missed"]
    judged = "ellipse_dice" if "ellipse_dice" in rows[0] else "dice"
    flags = sorted({flag for row in rows for flag in row["flags"].split()})
    table = [
        "| flag | images | mean `dice` | mean `hc_abs_error_mm` | largest |",
        "|---|--:|--:|--:|--:|",
    ]
    for flag in ("", *flags):
        members = [row for row in rows if flag in (row["flags"].split() or [""])]
        dices, errors = (
            np.array([float(row[name]) for row in members]) for name in ("dice", "hc_abs_error_mm")
        )
        if members:
            cells = (flag or "none", len(members), f"{dices.mean():.4f}", f"{errors.mean():.2f}")
            table.append(f"| {' | '.join(map(str, cells))} | {errors.max():.2f} |")
    worst = sorted(rows, key=lambda row: float(row[judged]))[:WORST_CASES]
    cases = [f"| image | trimester | `{judged}` | `hc_error_mm` | flags |", "|---|---|--:|--:|---|"]
    for row in worst:
        cells = (
            row["name"],
            row["trimester"],
            f"{float(row[judged]):.4f}",
            f"{float(row['hc_error_mm']):+.2f}",
            row["flags"] or "none",
        )
        cases.append(f"| {' | '.join(cells)} |")
    named = f": {', '.join(missed)}" if missed else ""
    return "\n\n".join(
        (
            f"Of the first evaluation above. No head was found in {len(missed)} images{named}.",
            "What the flags of `predict` catch, and what they don't:",
            "\n".join(table),
            f"The images of the lowest `{judged}`:",
            "\n".join(cases),
        )
    )


def float16_sentence(float16: Float16) -> str:
    """Returns what was measured, as one or two sentences."""
    told = (
        f"Weights of float16 in place of float32 change the circumference by at most "
        f"{float16.largest_mm:.4f} mm (in {float16.image}; {float16.mean_mm:.4f} mm in the mean of "
        f"{float16.images} images), and the lowest Dice between both masks is "
        f"{float16.lowest_dice:.5f}."
    )
    if float16.with_encoder_mm is not None:
        told += (
            " The encoder's weights stay float32: as float16 they would change it by up to "
            f"{float16.with_encoder_mm:.4f} mm."
        )
    return told


def _weights_sentence(float16: Float16) -> str:
    return (
        f"The largest change of a weight is {float16.largest_weight:.2g} of the largest in its "
        f"array, `{float16.array}`. Measured by `benchmarks/ship.py` on {float16.machine}, "
        f"{float16.date}."
    )


def _licence(facts: Facts) -> str:
    parts = [_LICENCE_OF_DATA[facts.run.description.dataset]]
    if facts.run.config.encoder.weights != "none" and facts.run.config.model.name != "unet":
        parts.append(_LICENCE_OF_ENCODER)
    return "\n\n".join(parts)


def _files(facts: Facts) -> str:
    arrays = facts.files[shipped.ARRAYS]
    loaded = json.loads(facts.files[shipped.DESCRIPTION])["sha256"]["variables"]
    return (
        f"| | |\n|---|---|\n| `{shipped.ARRAYS}` | {len(arrays):,} bytes, SHA-256 "
        f"`{hashlib.sha256(arrays).hexdigest()}` |\n| the arrays as they are loaded, float32 | "
        f"SHA-256 `{loaded}` |"
    )


def _number(metric: str, value: float) -> str:
    return f"{value:.2f}" if metric.endswith("_mm") else f"{value:.4f}"
