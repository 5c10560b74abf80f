"""What each part of the recipe does by itself: one training per row and seed, one table.

    python benchmarks/ablation.py --data-dir HC18 --encoder mobilenet_v2.pth --workdir runs/ablation

Every row changes one thing of `BASE`. Its best epoch is chosen by the ellipse's Dice at the
network's size over the whole validation split, and measured at native size on either half of the
validation examinations: choose by the first half, report the second. A row that was interrupted
goes on, one that is done is not trained again, so rows can be added in any order
(`--rows base "soft masks"`). `--runs WORKDIR ...` adds rows for whole recipes that were trained by
themselves, `--rows` without a name leaves the others out.
"""

import argparse
import csv
import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
BASE = (
    *("--schedule.decay", "cosine"),
    *("--schedule.early-stopping-patience", "None"),
    *("--schedule.select-by", "ellipse_dice"),
    *("--optimizer.learning-rate", "1e-3"),
)
ROWS = {
    "base": (),
    "averaged weights 0.99": ("--schedule.average-decay", "0.99"),
    "soft masks": ("--data.soft-masks",),
    "grey levels varied": (
        *("--augmentation.gain", "0.3", "--augmentation.gamma", "0.5"),
        *("--augmentation.blur-px", "1", "--augmentation.speckle", "0.2"),
        *("--augmentation.shadow", "0.5"),
    ),
    "pos_weight 1": ("--loss.pos-weight", "1"),
    "rate 3e-3 with warm-up": (
        *("--optimizer.learning-rate", "3e-3", "--schedule.warmup-epochs", "1"),
    ),
    "isotropic pixels": ("--data.image-size", "96", "160"),
}
METRICS = ("ellipse_dice", "ellipse_hausdorff_mm", "hc_abs_error_mm")
HALVES = ("half chosen by", "other half")


class Figures(NamedTuple):
    """Means of `METRICS` over either half of the validation examinations."""

    chosen_by: np.ndarray
    reported: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="HC18 folder")
    parser.add_argument("--encoder", help="as --encoder.weights; rows that are trained need it")
    parser.add_argument("--workdir", type=Path, default=Path("runs/ablation"))
    parser.add_argument(
        "--rows", nargs="*", default=list(ROWS), metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="workdirs of other runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--size", type=int, default=128, help="height and width of the images")
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    if unknown := set(arguments.rows) - set(ROWS):
        parser.error(f"there is no row {min(unknown)}: choose from {', '.join(ROWS)}")
    if arguments.rows and not arguments.encoder:
        parser.error("--encoder is needed by the rows that are trained")
    shared = (
        *("--config", str(ROOT / "configs" / "hc18.py")),
        *("--data.data-dir", str(arguments.data_dir), "--encoder.weights", str(arguments.encoder)),
        *("--data.image-size", str(arguments.size), str(arguments.size)),
        *("--schedule.epochs", str(arguments.epochs), *BASE),
    )
    print(f"| change | {HALVES[0]}: ellipse Dice, HD, ADF | {HALVES[1]} | seeds | minutes |")
    print("|---|---|---|---|---|")
    for name in arguments.rows:
        runs, minutes = [], 0.0
        for seed in arguments.seeds:
            workdir = arguments.workdir / f"{name.replace(' ', '-')}-{seed}"
            flags = (*shared, *ROWS[name], "--seed", str(seed), "--workdir", str(workdir))
            _train(workdir, flags, arguments.epochs)
            runs.append(_measure(workdir, arguments.data_dir))
            minutes += _minutes(workdir)
        print(_table_row(name, runs, minutes), flush=True)
    for workdir in arguments.runs:
        figures = _measure(workdir, arguments.data_dir)
        print(_table_row(workdir.name, [figures], _minutes(workdir)), flush=True)


def _train(workdir: Path, flags: Sequence[str], epochs: int) -> None:
    """Trains a row, or what is left of it."""
    log = workdir / "metrics.csv"
    if log.exists() and len(list(_rows(log))) == epochs and (workdir / "validation.png").exists():
        return
    resume = ["--resume"] if (workdir / "config.json").exists() else []
    _run("train", *flags, *resume)


def _measure(workdir: Path, data_dir: Path) -> Figures:
    output = workdir / "evaluation"
    if not (output / "per_image.csv").exists():
        _run(
            *("evaluate", "--checkpoint", str(workdir), "--data-dir", str(data_dir)),
            *("--split", "validation", "--output", str(output)),
        )
    halves: tuple[list, list] = ([], [])
    for row in _rows(output / "per_image.csv"):
        halves[half_of(row["name"])].append([float(row[name]) for name in METRICS])
    return Figures(*(np.mean(half, axis=0) for half in halves))


def half_of(name: str) -> int:
    """Returns the half of the validation examinations that an image is in, 0 or 1."""
    examination = name.partition("_")[0]
    return int(hashlib.sha256(f"half:{examination}".encode()).hexdigest(), 16) % 2


def _table_row(name: str, runs: Sequence[Figures], minutes: float) -> str:
    cells = []
    for half in zip(*runs, strict=True):
        dice, hausdorff, adf = np.mean(half, axis=0)
        cells.append(f"{dice:.4f}, {hausdorff:.2f}, {adf:.2f}")
    return f"| {name} | {' | '.join(cells)} | {len(runs)} | {minutes:.0f} |"


def _minutes(workdir: Path) -> float:
    return sum(float(row["seconds"]) for row in _rows(workdir / "metrics.csv")) / 60


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def _run(*arguments: str) -> None:
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "fetal_flax", *arguments], check=True, cwd=ROOT)
    print(f"{arguments[0]} took {time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
