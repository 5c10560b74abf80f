"""Our networks against PyTorch's, and the measurement itself."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import torch

from fetal_flax.config import (
    EncoderConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from fetal_flax.conversion.names import ENCODER
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables
from fetal_flax.parity import compare as parity
from fetal_flax.parity import reference
from fetal_flax.parity.compare import Error, Pair, StageError, compare
from fetal_flax.parity.report import failures
from fetal_flax.parity.run import load_pair, random_pair
from fetal_flax.parity.settings import ParitySettings

pytestmark = pytest.mark.usefixtures("quick_compilation")
POS_WEIGHT = 2.3
DESCRIBED = ModelConfig()
PUBLISHED = ModelConfig(variant="published")
COMPACT = ModelConfig(variant="compact")
MOBILENET_UNET = ModelConfig(name="mobilenet_unet")
UNET = ModelConfig(name="unet")
SMALL_UNET = TrainConfig(model=ModelConfig(name="unet", base_width=4))
# Its images are of one size, here and in test_run.py: XLA compiles for each size anew.


@pytest.fixture(scope="module")
def small_pair() -> Pair:
    return random_pair(SMALL_UNET)


def _changed(pair: Pair, name: str, factor: float) -> Pair:
    """The pair with one of our tensors multiplied."""
    params = pair.variables.params
    params = params | {name: params[name] * np.float32(factor)}
    return pair._replace(variables=pair.variables._replace(params=params))


# The networks. benchmarks/parity_matrix.py runs every combination; docs/parity.md has its figures.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "images", "size"),
    [
        (DESCRIBED, 1, (320, 224)),
        (PUBLISHED, 4, (256, 256)),
        (COMPACT, 1, (256, 256)),
        (MOBILENET_UNET, 4, (320, 224)),
        (UNET, 1, (256, 256)),
    ],
    ids=lambda value: value.title if isinstance(value, ModelConfig) else str(value),
)
def test_networks_agree_at_their_own_size(make_batch, model, images, size):
    pair = random_pair(TrainConfig(model=model))
    batches = [make_batch(images, *size)]
    for comparison in compare(pair, batches, pos_weight=POS_WEIGHT, steps=0):
        assert failures(comparison) == []
        assert comparison.jump is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "encoder"),
    [
        (DESCRIBED, EncoderConfig(weights="none")),
        (MOBILENET_UNET, EncoderConfig(weights="none", frozen_batch_norm="batch")),
        (MOBILENET_UNET, EncoderConfig(weights="none", trainable=True)),
    ],
    ids=["frozen", "drifting", "learning"],
)
def test_ten_steps_agree_however_the_encoder_is_treated(make_batch, model, encoder):
    pair = random_pair(TrainConfig(model=model, encoder=encoder))
    batches = [make_batch(2, 64, 96, seed) for seed in range(2)]
    [comparison] = compare(pair, batches, ["float64"], pos_weight=POS_WEIGHT, steps=10)
    assert failures(comparison) == []
    assert len(comparison.steps) == 10
    assert comparison.frozen_unchanged
    groups = {row.group for row in comparison.gradients}
    assert ("encoder" in groups) == encoder.trainable


@pytest.mark.slow
def test_a_small_unet_agrees_and_so_does_its_training(make_batch, small_pair):
    batches = [make_batch(2, 32, 48, seed) for seed in range(2)]
    exact, single = compare(small_pair, batches, pos_weight=POS_WEIGHT, steps=10)
    assert failures(exact) == failures(single) == []
    assert exact.frozen_unchanged
    # Both precisions ran, and rounding is all that is between them.
    assert exact.logits_over_std is not None and single.logits_over_std is not None
    assert exact.logits_over_std < 1e-12 < single.logits_over_std


@pytest.mark.slow
def test_a_small_unet_for_rgb_agrees_with_dice_over_the_batch(make_batch):
    model = dataclasses.replace(SMALL_UNET.model, in_channels=3)
    pair = random_pair(TrainConfig(model=model, loss=LossConfig(dice_over="batch")))
    batches = [make_batch(3, 32, 48, channels=3)]
    [exact] = compare(pair, batches, ["float64"], pos_weight=POS_WEIGHT, steps=0)
    assert failures(exact) == []


def test_the_two_dices_differ():
    logits = torch.linspace(-2, 2, 32).reshape(2, 1, 4, 4)
    masks = (logits > 0.3).float()
    per_image, over_batch = (
        reference.dice_bce_loss(logits, masks, LossConfig(dice_over=over), POS_WEIGHT)
        for over in ("image", "batch")
    )
    assert abs(per_image - over_batch) > 0.01


@pytest.mark.slow
def test_torchvisions_encoder_agrees_at_all_five_taps(make_batch, tmp_path):
    network = reference.Encoder(3)
    reference.randomise_norms(network, 0)
    torch.save(network.state_dict(), tmp_path / "mobilenet_v2.pth")
    pair = load_pair(tmp_path / "mobilenet_v2.pth", ParitySettings())
    assert pair.layout == ENCODER
    batches = [make_batch(2, 64, 96, channels=3)]
    exact, single = compare(pair, batches, pos_weight=POS_WEIGHT, steps=10)
    assert failures(exact) == failures(single) == []
    assert {f"enc{n}" for n in range(1, 6)} <= {row.stage for row in exact.stages}


@pytest.mark.slow
def test_the_real_encoder_agrees_with_its_real_weights(shared_dir, make_batch):
    path = shared_dir / "weights" / "mobilenet_v2_imagenet_dequantised.pth"
    pair = load_pair(path, ParitySettings())
    [single] = compare(
        pair, [make_batch(1, 256, 256, channels=3)], ["float32"], pos_weight=1, steps=0
    )
    assert failures(single) == []


# The measurement.


def test_a_changed_tensor_is_found_where_it_acts(make_batch, small_pair):
    changed = _changed(small_pair, "stage3/up/kernel", 1.001)
    [comparison] = compare(
        changed, [make_batch(2, 32, 48)], ["float64"], pos_weight=POS_WEIGHT, steps=0
    )
    assert comparison.jump == "stage3/up"
    assert any("logits" in line for line in failures(comparison))
    assert comparison.logits_over_std is not None and comparison.logits_over_std > 1e-6


def test_the_pair_is_not_changed(make_batch, small_pair):
    before = {name: t.clone() for name, t in small_pair.network.state_dict().items()}
    ours = {n: np.array(a) for part in small_pair.variables for n, a in part.items()}
    compare(small_pair, [make_batch(2, 32, 48)], ["float32"], pos_weight=POS_WEIGHT, steps=1)
    for name, tensor in small_pair.network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for part in small_pair.variables:
        for name, array in part.items():
            np.testing.assert_array_equal(array, ours[name])


@pytest.mark.parametrize(
    "model", [DESCRIBED, COMPACT, MOBILENET_UNET, UNET], ids=lambda model: model.title
)
def test_stages_are_places_of_both_networks(model):
    network = reference.create_reference(model)
    names = [*functional.shapes(model).params]
    for stage in parity.stages(model.name):
        assert network.get_submodule(stage.torch) is not None
        assert any(name.startswith(f"{stage.ours}/") for name in names), stage
    assert len({stage.label for stage in parity.stages(model.name)}) == len(
        parity.stages(model.name)
    )


def test_errors_are_what_they_say():
    theirs = np.array([1.0, -2.0, 1e-9, 4.0])
    error = parity.measure(theirs + np.array([0.1, 0, 0.1, 0]), theirs)
    assert error.max_abs == pytest.approx(0.1)
    assert error.max_relative == pytest.approx(0.1)  # the element near zero is left out
    assert error.rms_relative == pytest.approx(math.sqrt(0.02 / 21))
    assert parity.measure(theirs, theirs) == Error(0, 0, 0)


def test_nan_is_an_error_and_beyond_every_limit(small_pair, make_batch):
    changed = _changed(small_pair, "head/bias", math.nan)
    [comparison] = compare(
        changed, [make_batch(2, 32, 48)], ["float64"], pos_weight=POS_WEIGHT, steps=0
    )
    assert any("logits" in line for line in failures(comparison))
    assert any("loss" in line for line in failures(comparison))


def test_shapes_and_names_must_be_the_same():
    with pytest.raises(ValueError, match=r"\(2,\) and \(1, 2\)"):
        parity.measure(np.ones(2), np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"only on one side: \['b/y'\]"):
        parity.group_errors({"a/x": np.ones(1)}, {"a/x": np.ones(1), "b/y": np.ones(1)})


def test_groups_name_their_worst_tensor():
    theirs = {"a/x": np.full(4, 10.0), "a/y": np.ones(4), "b/z": np.zeros(2)}
    ours = {"a/x": np.full(4, 10.1), "a/y": np.full(4, 1.02), "b/z": np.zeros(2)}
    first, second = parity.group_errors(ours, theirs, exact=theirs)
    assert (first.group, first.tensors, first.worst) == ("a", 2, "a/y")
    assert first.worst_rms_relative == pytest.approx(0.02)
    assert first.ours_from_exact == pytest.approx(first.rms_relative)
    assert first.torch_from_exact == 0
    assert (second.group, second.worst_rms_relative) == ("b", 0)


def test_a_gradient_that_cancels_is_measured_against_its_group():
    theirs = {"a/x": np.full(4, 1.0), "a/zero": np.full(4, 1e-17)}
    ours = {"a/x": np.full(4, 1.0), "a/zero": np.full(4, 3e-17)}
    [row] = parity.group_errors(ours, theirs)
    assert row.worst == "a/zero"
    assert row.worst_rms_relative == pytest.approx(2e-13)
    wrong = ours | {"a/zero": np.full(4, 1e-6)}
    assert parity.group_errors(wrong, theirs)[0].worst_rms_relative > 1e-3


@pytest.mark.parametrize(
    ("errors", "jump"),
    [
        ((1e-16, 2e-16, 9e-16), None),
        ((1e-16, 1e-13, 2e-13), "b"),
        ((1e-13, 1e-13, 1e-13), "a"),
        ((1e-15, 8e-15, 1e-12), "c"),
    ],
)
def test_a_jump_is_the_first_hundredfold_step(errors, jump):
    rows = [
        StageError(name, "", (1,), Error(0, 0, error))
        for name, error in zip("abc", errors, strict=True)
    ]
    assert parity.find_jump(rows, "float64") == jump


def test_the_reference_is_randomised_where_it_matters(small_pair):
    for part in small_pair.network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            fields = (part.weight, part.bias, part.running_mean, part.running_var)
            assert all(field is not None and field.unique().numel() > 1 for field in fields)
            assert part.momentum == 0.1


def test_the_frozen_published_way_lets_statistics_drift():
    network = reference.create_reference(MOBILENET_UNET)
    running = EncoderConfig(weights="none", frozen_batch_norm="running")
    for encoder, drifts in (
        (running, False),
        (dataclasses.replace(running, frozen_batch_norm="batch"), True),
    ):
        config = TrainConfig(encoder=encoder)
        reference.set_training(network, config)
        before = network.get_submodule("encoder.0.1").state_dict()["running_mean"].clone()
        network(torch.rand(2, 1, 32, 32))
        after = network.get_submodule("encoder.0.1").state_dict()["running_mean"]
        assert torch.equal(before, after) != drifts
        assert not any(p.requires_grad for p in network.get_submodule("encoder").parameters())


def test_torchs_optimizer_has_the_runs_settings():
    config = TrainConfig(
        encoder=EncoderConfig(weights="none", trainable=True, learning_rate=1e-5),
        optimizer=OptimizerConfig(learning_rate=2e-3, beta1=0.8, beta2=0.99, epsilon=1e-7, l2=0.1),
    )
    network = reference.create_reference(MOBILENET_UNET)
    reference.set_training(network, config)
    encoder, rest = reference.create_optimizer(network, config).param_groups
    assert (encoder["lr"], rest["lr"]) == (1e-5, 2e-3)
    for group in (encoder, rest):
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.99), 1e-7, 0.1)
    counts = [len(group["params"]) for group in (encoder, rest)]
    assert counts == [156, len(list(network.parameters())) - 156]


def test_computing_in_float64_ends_with_the_comparison(small_pair, make_batch):
    compare(small_pair, [make_batch(2, 32, 48)], ["float64"], pos_weight=POS_WEIGHT, steps=0)
    assert jax.numpy.ones(1).dtype == np.float32
    assert isinstance(small_pair.variables, Variables)
