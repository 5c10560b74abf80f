"""Parity of every network with PyTorch, at several batch sizes and image sizes.

    python benchmarks/parity_matrix.py [--batch 1 4] [--size 256 256 --size 320 224] [--steps 10]

Networks of random numbers, norms included, on phantoms. Prints the tables of docs/parity.md.
"""

import argparse
import dataclasses
import itertools

from fetal_flax.config import DataConfig, EncoderConfig, LossConfig, ModelConfig, TrainConfig
from fetal_flax.parity.compare import Comparison, Pair, compare
from fetal_flax.parity.report import environment
from fetal_flax.parity.run import load_batches, random_pair
from fetal_flax.parity.settings import ParitySettings

NETWORKS = (
    ModelConfig(variant="described"),
    ModelConfig(variant="published"),
    ModelConfig(variant="compact"),
    ModelConfig(name="mobilenet_unet"),
    ModelConfig(name="unet"),
)
BATCH_DICE = LossConfig(dice_over="batch")
DRIFTING = EncoderConfig(weights="none", frozen_batch_norm="batch")
LEARNING = EncoderConfig(weights="none", trainable=True)
TRAININGS = (
    *(("frozen encoder", TrainConfig(model=model)) for model in NETWORKS),
    ("Dice over the batch", TrainConfig(loss=BATCH_DICE)),
    ("frozen encoder, drifting statistics", TrainConfig(encoder=DRIFTING)),
    ("learning encoder", TrainConfig(encoder=LEARNING)),
)
POS_WEIGHT = 2.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--size", type=int, nargs=2, action="append")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    sizes = options.size or [[256, 256], [320, 224]]
    print(", ".join(f"{name} {value}" for name, value in environment().items()))

    print(
        "\n| network | batch | image | logits | loss | worst gradient | worst statistic | logits |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for model in NETWORKS:
        pair = random_pair(TrainConfig(model=model))
        for batch, size in itertools.product(options.batch, sizes):
            exact, single = _compare(pair, batch, size)
            print(
                f"| {model.title} | {batch} | {size[0]}×{size[1]} | {exact.logits_over_std:.1e} "
                f"| {exact.loss_relative:.1e} | {_worst(exact.gradients):.1e} "
                f"| {_worst(exact.batch_stats):.1e} | {single.logits_over_std:.1e} |",
                flush=True,
            )
    if not options.steps:
        return
    print("\n| network | training | steps | loss, relative | worst parameter | frozen left alone |")
    print("|---|---|---|---|---|---|")
    for what, config in TRAININGS:
        [exact] = _compare(
            random_pair(config), 2, sizes[0], precisions=("float64",), steps=options.steps
        )
        last = exact.steps[-1]
        print(
            f"| {config.model.title} | {what} | {last.step} "
            f"| {abs(last.loss - last.torch_loss) / last.torch_loss:.1e} "
            f"| {last.worst_rms_relative:.1e} ({last.worst}) | {exact.frozen_unchanged} |",
            flush=True,
        )


def _compare(
    pair: Pair, batch: int, size: list[int], *, precisions=("float64", "float32"), steps: int = 0
) -> list[Comparison]:
    settings = ParitySettings(batch_size=batch, batches=2 if steps else 1)
    data = DataConfig(dataset="fetal_phantom", phantom_count=8, image_size=(size[0], size[1]))
    config = dataclasses.replace(pair.config, data=data)
    batches, _ = load_batches(config, settings)
    return compare(pair, batches, precisions, pos_weight=POS_WEIGHT, steps=steps)


def _worst(rows) -> float:
    return max(row.worst_rms_relative for row in rows)


if __name__ == "__main__":
    main()
