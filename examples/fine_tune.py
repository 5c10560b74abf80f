"""Fine-tunes a trained network on a folder of one's own, and measures what has come of it.

    python examples/fine_tune.py heads --begin hc18-compact --epochs 10 --output runs/heads

`heads` is in HC18's layout; docs/own-data.md tells how to make such a folder of one's masks.
"""

import argparse

import fetal_flax as ff
from fetal_flax.config import DataConfig, OptimizerConfig, ScheduleConfig


def show(who: str, metrics: dict) -> None:
    dice, error = metrics["dice"]["mean"], metrics["hc_abs_error_mm"]["mean"]
    print(f"{who}, on {metrics['n']} images: Dice {dice:.4f}, circumference {error:.2f} mm off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="images, outlines and sizes, in HC18's layout")
    parser.add_argument("--begin", default="hc18-compact", help="workdir, or a shipped network")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", default="runs/heads", help="a new folder for the run")
    options = parser.parse_args()

    # It has seen none of these images, so all of them may judge it.
    show("before", ff.evaluate(options.begin, options.folder))

    begin = ff.load_checkpoint(options.begin)
    config = ff.TrainConfig(
        name="heads",
        init=options.begin,
        model=begin.config,
        data=DataConfig(data_dir=options.folder, image_size=begin.image_size),
        # A rate that is warmed up and falls to 0 keeps most of what the network knows.
        optimizer=OptimizerConfig(learning_rate=5e-4),
        schedule=ScheduleConfig(
            epochs=options.epochs,
            batch_size=options.batch_size,
            decay="cosine",
            warmup_epochs=1,
            early_stopping_patience=None,
        ),
    )
    ff.train(config, options.output)

    # The fifth of the examinations that the run has put aside; all images of one are on one side.
    show("after", ff.evaluate(options.output, options.folder, split="validation"))


if __name__ == "__main__":
    main()
