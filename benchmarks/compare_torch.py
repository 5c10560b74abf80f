"""This project beside PyTorch on this machine: the same weights and data, runs in turn.

    python benchmarks/compare_torch.py [--quick] [--batch 1 16] [--size 256] [--repeats 15]

Inference and the training step with the frozen encoder, of the described network. Every way is
first checked to give the same logits or loss as PyTorch's, and in every round runs once before it
is timed: PyTorch's threads spin on after a call. Times are medians with quartiles in milliseconds;
a ratio is the median of the ratios to PyTorch's eager channels_last of the same round. On a GPU,
PyTorch runs there too; float32 products are then whatever each side's default is.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from timing import median_with_quartiles, normalised_max_difference, time_interleaved

from fetal_flax.config import EncoderConfig, TrainConfig
from fetal_flax.data.batch import Batch
from fetal_flax.data.images import resize_image, resize_mask
from fetal_flax.data.phantoms import make_phantom
from fetal_flax.models import functional
from fetal_flax.models.convolution import compiler_options
from fetal_flax.models.functional import Variables
from fetal_flax.parity import reference
from fetal_flax.parity.compare import Pair
from fetal_flax.parity.run import random_pair
from fetal_flax.training.compile import create_programs, create_state
from fetal_flax.training.sharding import create_mesh

BASE = "PyTorch, channels_last"
POS_WEIGHT = 2.3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACCELERATED = DEVICE == "cuda" or jax.default_backend() != "cpu"
SEVERAL = 2
"""Training steps that a call of `train_chunk` does here, as on a CPU in a run."""
# Largest difference from eager PyTorch: of logits over their deviation, of losses over the loss.
# GPUs round the factors of float32 products to ten bits.
TOLERANCES = {"float32": 1e-3 if DEVICE == "cpu" else 5e-2, "bfloat16": 0.3}


class Way(NamedTuple):
    """One way to compute a case."""

    name: str
    precision: str
    prepare: Callable[[], Callable[[], Any]]
    """Returns a function that runs once, waits for the result and returns it."""
    steps: int = 1
    """Training steps that a call does; its time is divided by them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="of inference")
    parser.add_argument("--train-batch", type=int, nargs="*", default=[16])
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60, help="after which a case repeats less")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.train_batch, options.size = [1], [2], 64
        options.repeats, options.no_compile = 3, True
    torch.set_float32_matmul_precision("high" if DEVICE == "cuda" else "highest")
    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}, torch {torch.__version__} on "
        f"{torch.cuda.get_device_name() if DEVICE == 'cuda' else 'cpu'}, "
        f"{torch.get_num_threads()} threads, {options.size}×{options.size}"
    )
    pair = random_pair(TrainConfig(encoder=EncoderConfig(weights="none")))
    failed = False
    for batch in options.batch:
        failed |= case(f"inference, batch {batch}", inference(pair, batch, options), options)
    for batch in options.train_batch:
        failed |= case(f"training step, batch {batch}", training(pair, batch, options), options)
    sys.exit(failed)


def case(title: str, ways: list[Way], options: argparse.Namespace) -> bool:
    """Measures and prints one table; returns whether anything was wrong."""
    print(f"\n{title}\n\n| | precision | first call, s | ms (quartiles) | ratio (quartiles) |")
    print("|---|---|---|---|---|", flush=True)
    calls, first, wrong = {}, {}, []
    expected = None
    for way in ways:
        start = time.perf_counter()
        try:
            call = way.prepare()
            result = np.asarray(call(), np.float64)
        except Exception as error:  # torch.compile fails in many ways where there is no compiler.
            if "compiled" not in way.name:
                raise
            wrong.append(f"{way.name} didn't run: {type(error).__name__}: {str(error)[:200]}")
            continue
        first[way.name] = time.perf_counter() - start
        expected = result if expected is None else expected
        error = normalised_max_difference(result, expected)
        if not error <= TOLERANCES[way.precision]:
            wrong.append(f"{way.name} differs by {error:.1e}")
        calls[way.name] = call
    seconds = time_interleaved(calls, options.repeats, options.seconds, warm=True)
    for way in ways:
        if way.name in calls:
            own = [s / way.steps for s in seconds[way.name]]
            ratios = [a / b for a, b in zip(own, seconds[BASE], strict=True)]
            print(
                f"| {way.name} | {way.precision} | {first[way.name]:.1f} "
                f"| {median_with_quartiles([1e3 * s for s in own], 1)} "
                f"| {median_with_quartiles(ratios, 2)} |"
            )
    for line in wrong:
        print(f"\n{line}")
    return any("differs" in line for line in wrong)


def data(batch: int, size: int) -> Batch:
    """Phantoms, another one in each place."""
    phantoms = [make_phantom(0, index) for index in range(batch)]
    image = np.stack([resize_image(p.image, (size, size)) for p in phantoms])[..., None]
    mask = np.stack([resize_mask(p.mask, (size, size)) > 0 for p in phantoms])[..., None]
    valid, record = np.ones(batch, bool), np.arange(batch, dtype=np.int32)
    return Batch(image, mask.astype(np.uint8), valid, record)


def inference(pair: Pair, batch: int, options: argparse.Namespace) -> list[Way]:
    images = data(batch, options.size).image / np.float32(255)

    def ours(dtype: str) -> Callable:
        def prepare() -> Callable:
            model = dataclasses.replace(pair.config.model, dtype=dtype)
            arrays = functional.fold(model, on_device(pair.variables))
            on = jnp.asarray(images)
            run = jax.jit(
                lambda arrays, x: functional.infer(model, arrays, x),
                compiler_options=compiler_options(),
            )
            return lambda: np.asarray(run(arrays, on).block_until_ready())

        return prepare

    def theirs(*, last: bool = True, compiled: bool = False, rough: bool = False) -> Callable:
        def prepare() -> Callable:
            network, x = network_of(pair, last).eval(), torch_map(images, last)
            # Frozen: the weights are constants of the program, with batch norms folded.
            run = torch.compile(network, options={"freezing": True}) if compiled else network

            def call():
                with torch.inference_mode(), autocast(rough):
                    return run(x).float().permute(0, 2, 3, 1).cpu().numpy()

            return call

        return prepare

    return ways(ours, theirs, options)


def training(pair: Pair, batch: int, options: argparse.Namespace) -> list[Way]:
    batch_of_data = data(batch, options.size)

    def ours(dtype: str, several: int = 1) -> Callable:
        def prepare() -> Callable:
            model = dataclasses.replace(pair.config.model, dtype=dtype)
            config = dataclasses.replace(pair.config, model=model)
            mesh = create_mesh(jax.devices()[:1])
            programs = create_programs(config, mesh)
            state = create_state(config, on_device(pair.variables), mesh)
            step, on = programs.train_step, (jax.device_put(batch_of_data),)
            if several > 1:
                stacked = jax.tree.map(lambda array: np.stack([array] * several), batch_of_data)
                step, on = programs.train_chunk, (None, jax.device_put(stacked))

            def call() -> float:
                nonlocal state
                state, metrics = step(state, POS_WEIGHT, *on)
                jax.block_until_ready(state)
                return float(metrics["loss"].ravel()[0])

            return call

        return prepare

    def theirs(*, last: bool = True, compiled: bool = False, rough: bool = False) -> Callable:
        def prepare() -> Callable:
            network = network_of(pair, last)
            reference.set_training(network, pair.config)
            optimizer = reference.create_optimizer(network, pair.config)
            x = torch_map(batch_of_data.image / np.float32(255), last)
            masks = torch_map(batch_of_data.mask.astype(np.float32), last)

            def loss_of(x: torch.Tensor) -> torch.Tensor:
                with autocast(rough):
                    logits = network(x)
                return reference.dice_bce_loss(logits.float(), masks, pair.config.loss, POS_WEIGHT)

            run = torch.compile(loss_of) if compiled else loss_of

            def call() -> float:
                optimizer.zero_grad()
                loss = run(x)
                loss.backward()
                optimizer.step()
                if DEVICE == "cuda":
                    torch.cuda.synchronize()
                return loss.item()

            return call

        return prepare

    rows = ways(ours, theirs, options)
    several = f"ours, {SEVERAL} steps a call"
    rows.append(Way(several, "float32", ours("float32", SEVERAL), SEVERAL))
    if ACCELERATED:
        way = ours("bfloat16", SEVERAL)
        rows.append(Way(f"{several}, bfloat16", "bfloat16", way, SEVERAL))
    return rows


def ways(ours: Callable, theirs: Callable, options: argparse.Namespace) -> list[Way]:
    rows = [
        Way(BASE, "float32", theirs()),
        Way("PyTorch", "float32", theirs(last=False)),
        Way("PyTorch, channels_last, autocast", "bfloat16", theirs(rough=True)),
        Way("PyTorch, compiled", "float32", theirs(compiled=True)),
        Way("PyTorch, compiled, autocast", "bfloat16", theirs(compiled=True, rough=True)),
        Way("ours", "float32", ours("float32")),
    ]
    if ACCELERATED:
        rows.append(Way("ours, bfloat16", "bfloat16", ours("bfloat16")))
    return [way for way in rows if not (options.no_compile and "compiled" in way.name)]


def network_of(pair: Pair, last: bool) -> torch.nn.Module:
    network = reference.create_reference(pair.config.model)
    network.load_state_dict(pair.network.state_dict())
    return network.to(DEVICE, memory_format=layout(last))


def torch_map(array: np.ndarray, last: bool) -> torch.Tensor:
    """Returns an NHWC array as a PyTorch map."""
    tensor = torch.tensor(array.transpose(0, 3, 1, 2))
    return tensor.to(DEVICE).contiguous(memory_format=layout(last))


def layout(last: bool) -> torch.memory_format:
    return torch.channels_last if last else torch.contiguous_format


def autocast(rough: bool) -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16, enabled=rough)


def on_device(variables: Variables) -> Variables:
    return jax.tree.map(jnp.asarray, variables)


if __name__ == "__main__":
    main()
