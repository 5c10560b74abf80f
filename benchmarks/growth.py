"""How time grows with batch, image side, device count and data set, on this machine.

    python benchmarks/growth.py [--quick]

The described network, float32. Runs of a table alternate; medians count. Device counts are those
of XLA's fake CPU devices, which share this machine's cores: what they show is the cost of
dividing, not a gain.
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
from timing import time_interleaved

from fetal_flax._util.png import encode_png
from fetal_flax.checkpoints import Checkpoint, Description
from fetal_flax.config import AugmentationConfig, DataConfig, EncoderConfig, TrainConfig
from fetal_flax.data.batch import gather_batch
from fetal_flax.data.datasets import Dataset
from fetal_flax.data.device_loader import load_device_dataset, training_recipes
from fetal_flax.data.host_loader import training_batches
from fetal_flax.data.phantoms import make_phantom
from fetal_flax.data.samples import TrainingOrder, split_into_calls
from fetal_flax.inference.segmenter import Segmenter
from fetal_flax.models import functional
from fetal_flax.training.compile import create_programs, create_state
from fetal_flax.training.sharding import batch_sharding, create_mesh, replicated, step_sharding

CONFIG = TrainConfig(encoder=EncoderConfig(weights="none"))
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--step-side", type=int, help="time one training step and print seconds")
    options = parser.parse_args()
    if options.step_side:
        print(training_step(options.step_side, options.repeats))
        return
    batches, sides, step_side, images = (1, 2, 4, 8, 16, 32, 64), (128, 256, 384, 512), 128, 800
    if options.quick:
        batches, sides, step_side, images, options.repeats = (1, 2), (64, 96), 64, 64, 2
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores")
    side = sides[1]
    print(f"\n| inference at {side}×{side}, batch | ms per image |\n|---|---|")
    print_rows({batch: inference(batch, side) for batch in batches}, options.repeats)
    print("\n| inference, side (batch 4) | ms per image | ms per 65,536 pixels |\n|---|---|---|")
    print_rows({(4, side): inference(4, side) for side in sides}, options.repeats)
    print(f"\n| devices | ms per training step of {BATCH} at {step_side}×{step_side} |\n|---|---|")
    for devices in (1, 2, 4, 8):
        print(f"| {devices} | {1e3 * step_in_process(devices, step_side, options.repeats):.0f} |")
    print(
        "\n| images | backend | start, s | images/s without training | memory of the images, MB |"
        "\n|---|---|---|---|---|"
    )
    for count in (images, 10 * images):
        data_set(count, "host", sides[1])
        data_set(count, "device", sides[1])


def print_rows(calls: dict, repeats: int) -> None:
    seconds = time_interleaved(calls, repeats)
    for key, taken in seconds.items():
        batch, side = key if isinstance(key, tuple) else (key, None)
        each = 1e3 * statistics.median(taken) / batch
        pixels = "" if side is None else f" {each * 65_536 / side**2:.1f} |"
        print(f"| {key if side is None else side} | {each:.1f} |{pixels}")


def inference(batch: int, side: int):
    """Returns a call that runs a batch."""
    metadata = Description("network", CONFIG.model, (side, side))
    segmenter = Segmenter(Checkpoint(variables(), metadata), batch_size=batch)
    function, arguments = segmenter.call(jax.numpy.zeros((batch, side, side, 1), np.uint8))
    return lambda: jax.block_until_ready(function(*arguments))


@functools.cache
def variables() -> functional.Variables:
    return functional.init(CONFIG.model, 0)


def step_in_process(devices: int, side: int, repeats: int) -> float:
    """Returns a step's seconds on so many devices, whose number a process can't change."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, __file__, "--step-side", str(side), "--repeats", str(repeats)]
    # With fewer threads than devices, collectives wait for each other until XLA gives up.
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": "16"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def training_step(side: int, repeats: int) -> float:
    mesh = create_mesh()
    state, step = create_state(CONFIG, variables(), mesh), create_programs(CONFIG, mesh).train_step
    dataset = phantoms(BATCH)
    config = DataConfig(image_size=(side, side), workers=0)
    batch = next(batches_of(dataset, config, 1))
    batch = jax.device_put(batch, batch_sharding(mesh))

    def call():
        nonlocal state
        state, metrics = step(state, 2.3, batch)
        return state, metrics

    return statistics.median(time_interleaved({"step": call}, repeats)["step"])


def data_set(count: int, backend: str, side: int) -> None:
    """Prints what it takes to have batches of a data set ready on the device, nothing trained."""
    dataset, size, steps, mesh = phantoms(count), (side, side), 40, create_mesh()
    start = time.perf_counter()
    if backend == "host":
        batches = batches_of(dataset, DataConfig(image_size=size, workers=0), steps)
        megabytes = 0
        ready = (jax.device_put(batch, batch_sharding(mesh)) for batch in batches)
    else:
        images = load_device_dataset(dataset, size, replicated(mesh))
        megabytes = sum(array.nbytes for array in images) / 1e6
        order = TrainingOrder(tuple(range(count)), AugmentationConfig(), 0, BATCH)
        recipes = training_recipes(order, size, split_into_calls(1, steps, 0, steps))
        gather = jax.jit(
            lambda images, recipe: gather_batch(images, jax.tree.map(first, recipe), 1)
        )
        sharding = step_sharding(mesh)
        ready = (gather(images, jax.device_put(recipe, sharding)) for recipe in recipes)
    jax.block_until_ready(next(ready))
    started = time.perf_counter()
    for batch in ready:
        jax.block_until_ready(batch)
    rate = (steps - 1) * BATCH / (time.perf_counter() - started)
    print(f"| {count} | {backend} | {started - start:.1f} | {rate:.0f} | {megabytes:.0f} |")


def batches_of(dataset: Dataset, config: DataConfig, steps: int):
    return training_batches(
        dataset,
        range(len(dataset)),
        config,
        AugmentationConfig(),
        channels=1,
        seed=0,
        batch_size=BATCH,
        total_steps=steps,
    )


def phantoms(count: int) -> Dataset:
    """Returns a data set of any length, of 48 images; reading one costs what HC18's do."""
    names = [f"{index:05d}" for index in range(count)]
    return Dataset([stored(index % 48) for index in range(count)], names=names, examinations=names)


@functools.cache
def stored(index: int) -> dict:
    phantom = make_phantom(0, index)
    return {
        "image": encode_png(phantom.image),
        "mask": encode_png(phantom.mask),
        "pixel_size_mm": phantom.pixel_size_mm,
        "head_circumference_mm": phantom.head_circumference_mm,
        "examination": b"",
        "name": b"",
    }


def first(array):
    return array[0]


if __name__ == "__main__":
    main()
