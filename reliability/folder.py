"""Does the memory of `predict` stay flat, however long the folder?

    python reliability/folder.py --images 5000

Writes so many small images with a disc in each, segments them with an untrained network and prints
the memory of the process after every tenth of them. What may grow is the table of results, some
kilobytes an image. Fails if the second half adds more than ALLOWED_MB. Needs Linux.
"""

import argparse
import sys
import tempfile
import threading
from pathlib import Path

import cv2
import numpy as np

from fetal_flax import checkpoints
from fetal_flax.checkpoints import Checkpoint, Description
from fetal_flax.config import ModelConfig
from fetal_flax.inference.predict import predict
from fetal_flax.models import functional

SIZE = (96, 128)
ALLOWED_MB = 25


def main() -> None:
    """Runs one folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--workers", type=int, help="as of fetal-flax predict")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images", options.images)
        model = ModelConfig(name="unet", base_width=4)
        network = Checkpoint(functional.init(model, 0), Description("network", model, (32, 32)))
        checkpoints.save_checkpoint(folder / "network", network)
        memory = follow(folder, options.images, options.workers)
    if len(memory) < 10:
        sys.exit("predict ended before its last image")
    middle, last = memory[5], memory[-1]
    if last - middle > ALLOWED_MB:
        sys.exit(f"memory grew from {middle} to {last} MB in the second half")


def write_images(folder: Path, count: int) -> None:
    """Writes images of noise with a bright ellipse in each."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        image = rng.integers(0, 60, SIZE, np.uint8)
        center = (int(rng.integers(40, 88)), int(rng.integers(40, 56)))
        cv2.ellipse(image, center, (32, 24), 0, 0, 360, 200, -1)
        cv2.imwrite(str(folder / f"{number:06d}.png"), image)


def follow(folder: Path, count: int, workers: int | None) -> list[int]:
    """Predicts the folder, and returns the megabytes after every tenth of its images."""
    arguments = folder / "network", folder / "images", folder / "results"
    thread = threading.Thread(target=predict, args=arguments, kwargs={"workers": workers})
    thread.start()
    print("| images | MB |\n|---|---|")
    memory: list[int] = []
    overlays = folder / "results" / "overlays"
    alive = True
    while alive:
        thread.join(0.2)
        alive = thread.is_alive()
        done = len(list(overlays.glob("*.png"))) if overlays.is_dir() else 0
        while len(memory) < 10 and done * 10 >= (len(memory) + 1) * count:
            memory.append(resident_mb())
            print(f"| {done} | {memory[-1]} |", flush=True)
    return memory


def resident_mb() -> int:
    """Returns the memory that this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    main()
