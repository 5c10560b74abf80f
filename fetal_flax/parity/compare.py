"""Runs a network in PyTorch and in Flax on the same images and measures the difference.

What is compared climbs: stages, logits and masks, loss, gradients, batch statistics, and a training
of some steps. Both sides begin with the same float32 numbers, whatever precision they compute in.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax.sharding import Mesh
from scipy.special import expit
from torch import Tensor, nn

from fetal_flax.config import TrainConfig
from fetal_flax.conversion.names import ENCODER, IGNORED, TABLES, find
from fetal_flax.data.batch import Batch
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables
from fetal_flax.models.mobilenet_v2 import OUT_INDICES
from fetal_flax.parity import reference
from fetal_flax.parity.settings import Precision
from fetal_flax.training.compile import create_programs, create_state
from fetal_flax.training.sharding import create_mesh
from fetal_flax.training.step import TrainState, loss_and_gradients

# A stage's error is a jump where it is this many times what came in.
JUMP = 100
# Relative errors of single elements are taken where the reference is not nearly zero.
NEAR_ZERO = 1e-3
# A tensor is measured against its own norm, or this share of its part's if that is more: a gradient
# that cancels has only the digits that its terms leave it.
CANCELLED = 1e-4


@dataclasses.dataclass(frozen=True)
class Error:
    """How far a tensor is from the reference."""

    max_abs: float
    """Largest difference."""
    max_relative: float
    """Largest difference over the reference's element, where that is at least a thousandth of the
    reference's root mean square."""
    rms_relative: float
    """Norm of the difference over the reference's norm."""


@dataclasses.dataclass(frozen=True)
class StageError:
    """Error of one stage's output in evaluation."""

    stage: str
    torch: str
    shape: tuple[int, ...]
    error: Error


@dataclasses.dataclass(frozen=True)
class GroupError:
    """Errors of a group of tensors: one part of the network."""

    group: str
    tensors: int
    rms_relative: float
    """Over the whole group, as one vector."""
    worst: str
    """The tensor that is furthest off."""
    worst_rms_relative: float
    """By its own norm, but where it is less than a ten-thousandth of the group's, by that."""
    ours_from_exact: float | None = None
    torch_from_exact: float | None = None
    """Where PyTorch's float64 is known: how far either side is from that, over the group."""


@dataclasses.dataclass(frozen=True)
class StepError:
    """One optimizer step: losses before it, parameters after it."""

    step: int
    loss: float
    torch_loss: float
    parameters_rms_relative: float
    worst: str
    worst_rms_relative: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that was measured in one precision; an encoder alone has stages only."""

    precision: Precision
    stages: list[StageError]
    jump: str | None
    logits: Error | None = None
    logits_over_std: float | None = None
    """Largest difference of logits over their standard deviation."""
    probability_max_abs: float | None = None
    mask_pixels_differing: int | None = None
    mask_pixels: int | None = None
    loss: float | None = None
    torch_loss: float | None = None
    loss_relative: float | None = None
    gradients: list[GroupError] = dataclasses.field(default_factory=list)
    batch_stats: list[GroupError] = dataclasses.field(default_factory=list)
    steps: list[StepError] = dataclasses.field(default_factory=list)
    frozen_unchanged: bool | None = None
    """Whether every frozen parameter left the steps as it came, to the bit, on both sides."""


class Pair(NamedTuple):
    """The same numbers on both sides."""

    layout: str
    """Which of the conversion's tables names the tensors."""
    config: TrainConfig
    """Network and training; no dropout, whose random numbers can't agree."""
    network: nn.Module
    """PyTorch's, float32: a network or encoder of reference.py."""
    variables: Variables
    """Ours, float32; of an encoder alone, an encoder's."""


class Stage(NamedTuple):
    """A place where both networks have the same map."""

    ours: str
    torch: str
    item: int | None = None
    """Which of the maps that ours returns there."""

    @property
    def label(self) -> str:
        """How reports name the stage."""
        return self.ours if self.item is None else f"enc{self.item + 1}"


def stages(layout: str) -> list[Stage]:
    """Returns the stages of a network in the order of computation."""
    if layout == "unet":
        return [
            Stage("down1", "inc.double_conv"),
            *(Stage(f"down{n + 1}", f"down{n}.maxpool_conv.1.double_conv") for n in (1, 2, 3)),
            Stage("bottom", "down4.maxpool_conv.1.double_conv"),
            *(
                stage
                for n in (4, 3, 2, 1)
                for stage in (
                    Stage(f"stage{n}/up", f"up{5 - n}.up"),
                    Stage(f"stage{n}/block", f"up{5 - n}.conv.double_conv"),
                )
            ),
            Stage("head", "outc"),
        ]
    prefix = "features" if layout == ENCODER else "encoder"
    encoder = [
        # Ours end with the norm where torchvision's end with ReLU6.
        Stage("encoder/blocks/0", f"{prefix}.0.1"),
        *(Stage(f"encoder/blocks/{n}", f"{prefix}.{n}") for n in range(1, 18)),
        Stage("encoder/blocks/18", f"{prefix}.18.1"),
        *(Stage("encoder", f"{prefix}.{n}", item) for item, n in enumerate(OUT_INDICES)),
    ]
    if layout == ENCODER:
        return encoder
    if layout == "mobilenet_unet":
        bottleneck = [Stage("bottleneck", "bottleneck.conv")]
    else:
        aspp = "bottleneck_aspp"
        bottleneck = [
            Stage("aspp/point", f"{aspp}.conv1x1.1"),
            *(Stage(f"aspp/atrous/{n}", f"{aspp}.atrous_convs.{n}.1") for n in range(3)),
            Stage("aspp/pool_conv", f"{aspp}.global_avg_pool.1"),
            Stage("aspp/pool_norm", f"{aspp}.global_avg_pool.2"),
            Stage("aspp/project", f"{aspp}.project.1"),
            Stage("aspp", aspp),
        ]
    decoder = []
    for n in (5, 4, 3, 2, 1):
        decoder.append(Stage(f"stage{n}/up", f"up{n}"))
        if layout == "mobilenet_aspp_se_unet":
            decoder.append(Stage(f"stage{n}/skip_se", f"skip{n}_se"))
            decoder.append(Stage(f"stage{n}/block", f"dec{n}"))
        else:
            decoder.append(Stage(f"stage{n}/block", f"dec{n}.conv"))
    return [
        Stage("init_conv", "init_conv.1"),
        *encoder,
        *bottleneck,
        *decoder,
        Stage("head", "out_conv"),
    ]


def compare(
    pair: Pair,
    batches: Sequence[Batch],
    precisions: Sequence[Precision] = ("float64", "float32"),
    *,
    pos_weight: float,
    steps: int,
) -> list[Comparison]:
    """Measures everything, in each precision.

    Gradients in float32 are compared with PyTorch's in float64 too, if float64 comes first: they
    differ by whole percents between any two implementations, since a ReLU whose input is nearly
    zero is open on one side and closed on the other. It matters that neither is further from the
    truth.

    Args:
        pair: What to compare; it is not changed.
        batches: Images and masks; the first serves all but the steps, which take them in turn.
        precisions: What both sides compute in.
        pos_weight: Factor on the cross-entropy of foreground pixels.
        steps: Optimizer steps to train.
    """
    comparisons, exact = [], None
    for precision in precisions:
        with computing_in(precision):
            at = _cast(pair, precision)
            measured: dict[str, Any] = {}
            rows, logits, torch_logits = compare_stages(at, batches[0])
            if pair.layout != ENCODER:
                measured |= compare_logits(logits, torch_logits)
                errors, gradients = compare_backward(at, batches[0], pos_weight, exact=exact)
                measured |= errors
                exact = gradients if precision == "float64" else exact
                if steps:
                    measured |= compare_training(at, batches, pos_weight, steps)
        jump = find_jump(rows, precision)
        comparisons.append(Comparison(precision, rows, jump, **measured))
    return comparisons


def compare_stages(pair: Pair, batch: Batch) -> tuple[list[StageError], np.ndarray, np.ndarray]:
    """Returns every stage's error in evaluation, and the last stage's maps, ours and torch's."""
    places = stages(pair.layout)
    ours, theirs = _our_stages(pair, places, batch), _torch_stages(pair, places, batch)
    rows = [
        StageError(place.label, place.torch, b.shape, measure(a, b))
        for place, a, b in zip(places, ours, theirs, strict=True)
    ]
    return rows, ours[-1], theirs[-1]


def find_jump(rows: Sequence[StageError], precision: Precision) -> str | None:
    """Returns the first stage whose error is a hundredfold what any stage before it had."""
    largest = float(np.finfo(precision).eps)
    for row in rows:
        if row.error.rms_relative > JUMP * largest:
            return row.stage
        largest = max(largest, row.error.rms_relative)
    return None


def compare_logits(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Returns the errors of logits, probabilities and masks, as fields of `Comparison`."""
    error = measure(ours, theirs)
    return {
        "logits": error,
        "logits_over_std": error.max_abs / float(theirs.std()),
        "probability_max_abs": float(np.abs(expit(ours) - expit(theirs)).max()),
        "mask_pixels_differing": int(((ours > 0) != (theirs > 0)).sum()),
        "mask_pixels": theirs.size,
    }


def compare_backward(
    pair: Pair,
    batch: Batch,
    pos_weight: float,
    *,
    exact: Mapping[str, np.ndarray] | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the errors of loss, gradients and updated statistics, and PyTorch's gradients.

    Args:
        pair: What to compare.
        batch: Images and masks.
        pos_weight: Factor on the cross-entropy of foreground pixels.
        exact: Gradients in a higher precision, where they are known.
    """
    backward = jax.jit(functools.partial(loss_and_gradients, config=pair.config))
    ours = backward(_state(pair), batch, pos_weight=pos_weight)

    network = copy.deepcopy(pair.network)
    reference.set_training(network, pair.config)
    torch_loss = _torch_loss(network, pair, batch, pos_weight)
    torch_loss.backward()
    parameters = network.named_parameters()
    gradients = _in_our_names(
        {name: p.grad for name, p in parameters if p.grad is not None}, pair.layout
    )
    batch_stats = _in_our_names(dict(network.named_buffers()), pair.layout)
    errors = {
        "loss": float(ours.loss),
        "torch_loss": torch_loss.item(),
        "loss_relative": _relative_norm(ours.loss, torch_loss.item()),
        "gradients": group_errors(ours.gradients, gradients, exact=exact),
        "batch_stats": group_errors(ours.batch_stats, batch_stats),
    }
    return errors, gradients


def compare_training(
    pair: Pair, batches: Sequence[Batch], pos_weight: float, steps: int
) -> dict[str, Any]:
    """Trains both and returns the errors of every step, as fields of `Comparison`."""
    train = create_programs(pair.config, _mesh()).train_step
    state = _state(pair)
    network = copy.deepcopy(pair.network)
    reference.set_training(network, pair.config)
    optimizer = reference.create_optimizer(network, pair.config)
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]

    rows = []
    for step, batch in zip(range(1, steps + 1), itertools.cycle(batches)):
        state, metrics = train(state, pos_weight, batch)
        optimizer.zero_grad()
        loss = _torch_loss(network, pair, batch, pos_weight)
        loss.backward()
        optimizer.step()
        learning = {n: p for n, p in network.named_parameters() if p.requires_grad}
        theirs = _in_our_names(learning, pair.layout)
        [error] = group_errors({n: state.params[n] for n in theirs}, theirs, group=lambda _: "all")
        rows.append(
            StepError(
                step,
                float(metrics["loss"]),
                loss.item(),
                error.rms_relative,
                error.worst,
                error.worst_rms_relative,
            )
        )
    before, after = dict(pair.network.named_parameters()), dict(network.named_parameters())
    left_alone = _in_our_names({name: before[name] for name in frozen}, pair.layout)
    return {
        "steps": rows,
        "frozen_unchanged": all(torch.equal(before[n], after[n]) for n in frozen)
        and all(np.array_equal(state.params[n], array) for n, array in left_alone.items()),
    }


def measure(ours: Any, theirs: Any) -> Error:
    """Returns the error of one tensor.

    Raises:
        ValueError: The shapes differ.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes {ours.shape} and {theirs.shape} can't be compared")
    difference, size = np.abs(ours - theirs), np.abs(theirs)
    rms = float(np.sqrt(np.square(theirs).mean()))
    counted = size >= NEAR_ZERO * rms
    relative = difference[counted] / np.where(size, size, 1)[counted]
    return Error(
        max_abs=float(difference.max()),
        max_relative=float(relative.max()),
        rms_relative=_relative_norm(ours, theirs),
    )


def group_errors(
    ours: Mapping[str, Any],
    theirs: Mapping[str, np.ndarray],
    *,
    group: Callable[[str], str] = lambda name: name.split("/")[0],
    exact: Mapping[str, np.ndarray] | None = None,
) -> list[GroupError]:
    """Returns the errors of named tensors, by part of the network.

    Raises:
        ValueError: The names differ.
    """
    if ours.keys() != theirs.keys():
        raise ValueError(f"only on one side: {sorted(ours.keys() ^ theirs.keys())}")
    names: dict[str, list[str]] = collections.defaultdict(list)
    for name in theirs:
        names[group(name)].append(name)
    rows = []
    for part, members in names.items():
        a, b, truth = (_joined(side, members) for side in (ours, theirs, exact))
        floor = CANCELLED * float(np.linalg.norm(b))
        errors = {name: _relative_norm(ours[name], theirs[name], floor) for name in members}
        worst = max(errors, key=errors.__getitem__)
        rows.append(
            GroupError(
                group=part,
                tensors=len(members),
                rms_relative=_relative_norm(a, b),
                worst=worst,
                worst_rms_relative=errors[worst],
                ours_from_exact=None if exact is None else _relative_norm(a, truth),
                torch_from_exact=None if exact is None else _relative_norm(b, truth),
            )
        )
    return rows


@contextlib.contextmanager
def computing_in(precision: Precision) -> Iterator[None]:
    """Has JAX compute in a precision, without the shortcuts that accelerators take by default."""
    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
        yield


def _cast(pair: Pair, precision: Precision) -> Pair:
    network = copy.deepcopy(pair.network).to(getattr(torch, precision))
    variables = Variables(
        *({name: jnp.asarray(a, precision) for name, a in part.items()} for part in pair.variables)
    )
    return pair._replace(network=network, variables=variables)


def _our_stages(pair: Pair, places: Sequence[Stage], batch: Batch) -> list[np.ndarray]:
    model, variables = pair.config.model, pair.variables
    dtype = next(iter(variables.params.values())).dtype
    if pair.layout == ENCODER:
        # What follows the encoder is not run.
        rest = functional.init(model, 0)
        variables = Variables(*(a | b for a, b in zip(rest, variables, strict=True)))

    def run(variables: Variables, images: jax.Array) -> list[jax.Array]:
        def forward(network: Any) -> None:
            if pair.layout == ENCODER:
                network.encoder(images, train=False)
            else:
                network(images)

        record = nnx.capture(forward, nnx.Intermediate, method_outputs=nnx.Intermediate)
        _, captured = record(functional.merge(model, variables))
        outputs = {
            "/".join(map(str, path[:-1])): variable.get_value()[0]
            for path, variable in nnx.to_flat_state(captured)
            if path[-1] == "__call__"
        }
        maps = [outputs[place.ours] for place in places]
        return [a if p.item is None else a[p.item] for a, p in zip(maps, places, strict=True)]

    images = jnp.asarray(batch.image, dtype) / 255
    return [np.asarray(a) for a in jax.jit(run)(variables, images)]


def _torch_stages(pair: Pair, places: Sequence[Stage], batch: Batch) -> list[np.ndarray]:
    network = copy.deepcopy(pair.network).eval()
    outputs: dict[str, np.ndarray] = {}

    def recording(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
            # A copy: the next module may be an in-place ReLU.
            outputs[name] = np.array(output.permute(0, 2, 3, 1).numpy())

        return record

    for place in places:
        network.get_submodule(place.torch).register_forward_hook(recording(place.torch))
    images, _ = _torch_batch(batch, network)
    with torch.no_grad():
        network(images)
    return [outputs[place.torch] for place in places]


def _torch_loss(network: nn.Module, pair: Pair, batch: Batch, pos_weight: float) -> Tensor:
    images, masks = _torch_batch(batch, network)
    return reference.dice_bce_loss(network(images), masks, pair.config.loss, pos_weight)


def _torch_batch(batch: Batch, network: nn.Module) -> tuple[Tensor, Tensor]:
    dtype = next(network.parameters()).dtype
    images, masks = (
        torch.tensor(np.asarray(array)).permute(0, 3, 1, 2).contiguous().to(dtype)
        for array in (batch.image, batch.mask)
    )
    return images / 255, masks


def _in_our_names(tensors: Mapping[str, Tensor], layout: str) -> dict[str, np.ndarray]:
    """Returns a state dict's arrays in our names and layout, in their own precision."""
    arrays = {}
    for torch_name, tensor in tensors.items():
        target = find(torch_name, TABLES[layout])
        if target is None:  # a counter
            assert IGNORED.fullmatch(torch_name), torch_name
            continue
        name, form = target
        array = form.to_ours(tensor.detach().numpy())
        assert array is not None, torch_name
        arrays[name] = np.array(array)
    return arrays


def _state(pair: Pair) -> TrainState:
    return create_state(pair.config, pair.variables, _mesh())


def _mesh() -> Mesh:
    return create_mesh(jax.devices()[:1])


def _joined(arrays: Mapping[str, Any] | None, names: Sequence[str]) -> np.ndarray:
    return np.concatenate([np.ravel(arrays[name]) for name in names]) if arrays else np.empty(0)


def _relative_norm(ours: Any, theirs: Any, floor: float = 0.0) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    difference, size = np.linalg.norm(ours - theirs), max(np.linalg.norm(theirs), floor)
    return 0.0 if difference == 0 else float(difference / size) if size else math.inf
