"""Converts PyTorch weights: `python convert_weights.py …` is `fetal-flax convert …`."""

import sys

from fetal_flax.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
