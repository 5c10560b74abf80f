"""What each choice in models/ saves on this machine, alone and all together.

    python benchmarks/choices.py [--batch 16] [--size 256] [--repeats 5] [--only training]

Inference and the training step with the frozen encoder, of the described network in float32. A
ratio is the time of the whole over its time with that choice replaced by the plain form: below 1,
the choice pays. Runs alternate; medians of the rounds' ratios with quartiles. All forms are first
checked to give the same logits, or loss.
"""

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from timing import median_with_quartiles, normalised_max_difference, time_interleaved

from fetal_flax.config import TrainConfig
from fetal_flax.data.batch import Batch
from fetal_flax.models import convolution, folding, functional, layers
from fetal_flax.models.layers import FeatureMap, UpConv, per_channel
from fetal_flax.training import compile as programs
from fetal_flax.training.sharding import create_mesh

TOLERANCE = 1e-3
"""Of logits over their deviation, of losses over the loss."""


class Choice(NamedTuple):
    """Something that `models/` does otherwise than the plain form."""

    name: str
    cases: str
    """Initials of the cases that it acts on: inference, training."""
    owner: Any
    attribute: str
    plain: Callable
    needed_by: tuple[str, ...] = ()
    """Choices that can't be made without it."""


def infer_whole(config, folded, images):
    return functional._structure(config, folded_for=jax.default_backend()).merge(folded)(images)


def transposed(self: UpConv, x: FeatureMap) -> FeatureMap:
    kernel = self.kernel[...].transpose(1, 2, 0, 3)[::-1, ::-1]
    return jax.lax.conv_transpose(x, kernel, (2, 2), "VALID") + per_channel(self.bias[...])


CHOICES = (
    Choice("convolutions by Eigen, not YNN", "it", programs, "compiler_options", lambda **_: {}),
    Choice("one image after the other", "i", functional, "infer", infer_whole),
    Choice("up-convolution and 3×3 as one", "i", folding, "fold_up", lambda stage: None),
    Choice("head in the last block", "i", folding, "fold_head", lambda network: None),
    Choice(
        "batch norms folded",
        "it",
        folding,
        "fold_norms",
        lambda module: None,
        needed_by=("head in the last block",),
    ),
    Choice("up-convolution as a product", "t", UpConv, "__call__", transposed),
    Choice(
        "batch norm's gradient rule",
        "t",
        layers,
        "normalize",
        lambda *arguments: layers._normalize(*arguments)[0],
    ),
    Choice(
        "gradients as NHWC convolutions",
        "t",
        convolution,
        "nhwc_convolution",
        lambda stride, dilation, x, kernel: convolution.plain_convolution(
            x, kernel, stride=stride, dilation=dilation
        ),
    ),
    Choice(
        "depthwise as nine shifted sums",
        "it",
        convolution,
        "depthwise_by_shifts",
        lambda stride, dilation, x, kernel: convolution.plain_convolution(
            x, kernel, stride=stride, dilation=dilation, depthwise=True
        ),
    ),
    Choice("no dead taps", "it", convolution, "crop_kernel_to_input", lambda kernel, *_: kernel),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("inference", "training"), default="")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {options.size}×{options.size}")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (options.batch, options.size, options.size, 1), np.uint8)
    batch = Batch(
        image=images,
        mask=(images > 127).astype(np.uint8),
        valid=np.ones(options.batch, np.bool_),
        index=np.arange(options.batch, dtype=np.int32),
    )
    one = jax.tree.map(lambda array: array[:1], batch)
    for case, title, create, given in (
        ("i", "inference of 1", inference, one),
        ("i", f"inference of {options.batch}", inference, batch),
        ("t", f"training step of {options.batch}", training, batch),
    ):
        if title.startswith(options.only):
            report(title, [c for c in CHOICES if case in c.cases], create, given, options.repeats)


def report(title: str, choices: list[Choice], create: Callable, batch: Batch, repeats: int) -> None:
    """Times a case with all choices, without each and without any, and prints its table."""
    without: dict[str, list[Choice]] = {"": []}
    for choice in choices:
        without[choice.name] = [c for c in choices if c is choice or c.name in choice.needed_by]
    without["**all together**"] = choices
    calls, results = {}, {}
    for name, replaced in without.items():
        with plainly(replaced):
            calls[name], results[name] = create(batch)
    for name, result in results.items():
        error = normalised_max_difference(result, results[""])
        assert error < TOLERANCE, f"{name}: {error:.1e}"
    seconds = time_interleaved(calls, repeats, warm=True)
    chosen = seconds.pop("")
    print(f"\n| {title}: {1e3 * statistics.median(chosen):.0f} ms | ratio (quartiles) |\n|---|---|")
    for name, times in seconds.items():
        ratios = [ours / theirs for ours, theirs in zip(chosen, times, strict=True)]
        print(f"| {name} | {median_with_quartiles(ratios, 2)} |", flush=True)


@contextlib.contextmanager
def plainly(choices: list[Choice]) -> Iterator[None]:
    """Replaces choices by their plain forms, for what is traced meanwhile."""
    with contextlib.ExitStack() as stack:
        for choice in choices:
            stack.enter_context(mock.patch.object(choice.owner, choice.attribute, choice.plain))
        functional._structure.cache_clear()
        functional.fold.clear_cache()
        yield


def inference(batch: Batch) -> tuple[Callable, np.ndarray]:
    """Returns a call of inference, and its logits."""
    config = TrainConfig().model
    folded = functional.fold(config, functional.init(config, 0))

    def logits(folded: functional.Arrays, image: np.ndarray) -> jax.Array:
        return functional.infer(config, folded, jnp.asarray(image, jnp.float32) / 255)

    infer = jax.jit(logits, compiler_options=programs.compiler_options())
    compiled = infer.lower(folded, batch.image).compile()
    return lambda: compiled(folded, batch.image), np.asarray(compiled(folded, batch.image))


def training(batch: Batch) -> tuple[Callable, np.ndarray]:
    """Returns a call of the training step, and its first loss."""
    config, mesh = TrainConfig(), create_mesh()
    train = programs.create_programs(config, mesh).train_step
    state = programs.create_state(config, functional.init(config.model, 0), mesh)
    pos_weight = np.float32(2.3)
    compiled = train.lower(state, pos_weight, batch).compile()
    latest = [compiled(state, pos_weight, batch)]

    def call() -> Any:
        latest.append(compiled(latest.pop()[0], pos_weight, batch))
        return latest[0]

    return call, np.asarray(latest[0][1]["loss"])


if __name__ == "__main__":
    main()
