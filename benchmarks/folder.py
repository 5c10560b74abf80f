"""What a folder takes beside the network alone: reading, resizing, measuring and writing overlap.

    python benchmarks/folder.py --folder HC18/test_set [--images 200] [--repeats 5] [--workers 16]

`predict` on images of the folder, in turn with the network on as many images that are ready, in
batches of the same size. Wall time, and the process's own: on a busy machine the latter says how
much work there is, and on an idle one whose cores the network fills both ratios are alike.
"""

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import numpy as np

import fetal_flax as ff
from fetal_flax.checkpoints import load_checkpoint
from fetal_flax.inference import predict
from fetal_flax.inference.sources import find_files

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--network", default="hc18-described")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, help="as of fetal-flax predict")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        files = itertools.cycle(find_files(options.folder))
        for number, file in zip(range(options.images), files, strict=False):
            shutil.copy(file, folder / "images" / f"{number:06d}{file.suffix}")
        compare(folder, options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Times both in turn, and prints the medians and the ratios."""
    checkpoint = load_checkpoint(options.network)
    shape = (BATCH, *checkpoint.image_size, checkpoint.config.in_channels)
    segmenter = ff.Segmenter(checkpoint, batch_size=BATCH, workers=options.workers)
    function, arguments = segmenter.call(jax.numpy.zeros(shape, np.uint8))

    def network() -> None:
        for _ in range(-(-options.images // BATCH)):
            jax.block_until_ready(function(*arguments))

    def whole() -> None:
        # Loaded and compiled once, so that a start isn't timed.
        with (
            mock.patch.object(predict, "load_checkpoint", lambda _: checkpoint),
            mock.patch.object(predict, "Segmenter", lambda *_, **__: segmenter),
        ):
            predict.predict(
                Path(options.network), folder / "images", folder / "out", workers=options.workers
            )

    times: dict[str, list[tuple[float, float]]] = {"network": [], "folder": []}
    for number in range(options.repeats + 1):
        for name, call in (("network", network), ("folder", whole)):
            taken = seconds(call)
            # The first round compiles.
            if number:
                times[name].append(taken)
    for kind, label in enumerate(("wall", "processor")):
        rounds = [(n[kind], f[kind]) for n, f in zip(*times.values(), strict=True)]
        alone, all_of_it = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(f / n for n, f in rounds)
        print(
            f"{label}: network alone {1e3 * alone / options.images:.1f} ms an image, folder "
            f"{1e3 * all_of_it / options.images:.1f}, median ratio {ratio:.2f}"
        )


def seconds(call: Callable[[], None]) -> tuple[float, float]:
    """Returns the wall time and the processor time of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


if __name__ == "__main__":
    main()
