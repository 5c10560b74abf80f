"""Trains a network: `python train.py …` is `fetal-flax train …`."""

import sys

from fetal_flax.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
