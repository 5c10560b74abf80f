import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fetal_flax._util.backend import programs_for
from fetal_flax.config import (
    AugmentationConfig,
    DataConfig,
    EncoderConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from fetal_flax.data.batch import Batch
from fetal_flax.data.photometric import UNCHANGED
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables
from fetal_flax.training import losses
from fetal_flax.training.compile import Programs, create_programs, create_state
from fetal_flax.training.sharding import create_mesh, replicated
from fetal_flax.training.step import (
    TrainState,
    all_finite,
    initial_state,
    network_of,
    small_arrays,
)

POS_WEIGHT = 2.3
UNET = TrainConfig(
    model=ModelConfig(name="unet", base_width=4), optimizer=OptimizerConfig(learning_rate=3e-3)
)
DEFAULT = TrainConfig()


class Run(NamedTuple):
    state: TrainState
    metrics: list[dict[str, float]]


def _variables(config: TrainConfig, dtype: Any = jnp.float32) -> Variables:
    """Fresh ones, but that no batch norm is as a fresh network has it.

    Where a shift makes no difference, before another batch norm, its gradient is rounding alone
    and Adam makes steps of it; beginning at zero, such a shift would be nothing else.
    """
    variables = functional.init(config.model, 0)
    rng = np.random.default_rng(0)
    stats = {n: a * rng.uniform(0.2, 1, a.shape) for n, a in _host(variables.batch_stats).items()}
    params = _host(variables.params)
    for name, array in params.items():
        if "norm/" in name:
            array += rng.uniform(-0.3, 0.3, array.shape)
    return Variables(
        {name: jnp.asarray(array, dtype) for name, array in params.items()},
        {name: jnp.asarray(a, dtype) for name, a in stats.items()},
    )


def _host(tree: Any) -> Any:
    return jax.tree.map(lambda a: np.array(a), tree)


def _train(
    config: TrainConfig, batches: list[Batch], *, devices: int = 1, dtype: Any = jnp.float32
) -> Run:
    mesh = create_mesh(jax.devices()[:devices])
    steps = create_programs(config, mesh)
    state = create_state(config, _variables(config, dtype), mesh)
    metrics = []
    for batch in batches:
        state, numbers = steps.train_step(state, POS_WEIGHT, batch)
        metrics.append({name: float(number) for name, number in numbers.items()})
    return Run(state, metrics)


def _assert_near(ours: dict, theirs: dict, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        a, b = np.asarray(ours[name]), np.asarray(theirs[name])
        assert a.dtype == b.dtype
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), name


def _assert_identical(ours: dict, theirs: dict) -> None:
    for name in ours:
        a, b = np.asarray(ours[name]), np.asarray(theirs[name])
        assert a.tobytes() == b.tobytes(), name


tiny = pytest.mark.usefixtures("tiny_network")


@pytest.fixture(scope="module")
def on_two_devices() -> tuple[Mesh, Programs]:
    mesh = create_mesh(jax.devices()[:2])
    return mesh, create_programs(UNET, mesh)


@pytest.fixture(params=["tiny", pytest.param("real", marks=pytest.mark.slow)])
def tiny_and_real(request) -> None:
    """Tests with a tiny network, and among the slow tests with the real one."""
    if request.param == "tiny":
        request.getfixturevalue("tiny_network")


def _assert_devices_agree_in_float64(
    config: TrainConfig, batches: list[Batch], *, devices: int
) -> None:
    with jax.enable_x64(True):
        before = _variables(config, jnp.float64)
        single = _train(config, batches, dtype=jnp.float64)
        sharded = _train(config, batches, devices=devices, dtype=jnp.float64)
        _assert_near(sharded.state.params, single.state.params, 1e-9)
        _assert_near(sharded.state.batch_stats, single.state.batch_stats, 1e-9)
        assert sharded.metrics == [pytest.approx(m, rel=1e-9) for m in single.metrics]
        assert _moved(_host(before.params), _host(single.state.params)) == {
            name for name in before.params if not name.startswith("encoder/")
        }


@pytest.mark.parametrize("dice_over", ["image", "batch"])
@pytest.mark.usefixtures("tiny_and_real")
def test_one_and_eight_devices_agree(dice_over, make_batch):
    config = TrainConfig(model=UNET.model, loss=LossConfig(dice_over=dice_over))
    batches = [make_batch(8, 32, 16, seed) for seed in range(3)]
    _assert_devices_agree_in_float64(config, batches, devices=8)


@pytest.mark.slow
def test_one_and_eight_devices_agree_in_float32(make_batch):
    batches = [make_batch(8, 32, 32, seed) for seed in range(3)]
    config = TrainConfig(model=UNET.model)
    single, sharded = _train(config, batches), _train(config, batches, devices=8)
    # Where gradients nearly vanish, Adam makes whole steps of rounding: up to 2e-5 of the third
    # loss. Float64 shows that it is nothing else.
    for ours, theirs, tolerance in zip(
        sharded.metrics, single.metrics, (1e-5, 1e-5, 1e-4), strict=True
    ):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)


@pytest.mark.slow
def test_one_device_and_two_agree_on_the_default_network(make_batch):
    """On eight, XLA's collectives wait for each other for ever where there are but two cores."""
    batches = [make_batch(8, 64, 64, seed) for seed in range(3)]
    _assert_devices_agree_in_float64(DEFAULT, batches, devices=2)


@pytest.mark.parametrize(
    ("tiny_and_real", "config"),
    [
        ("tiny", UNET),
        pytest.param("real", UNET, marks=pytest.mark.slow),
        pytest.param("real", DEFAULT, marks=pytest.mark.slow),
    ],
    indirect=["tiny_and_real"],
    ids=["tiny", "unet", "described"],
)
@pytest.mark.usefixtures("tiny_and_real")
def test_a_gpus_step_is_a_cpus_in_float64(config, make_batch):
    batches = [make_batch(4, 64, 64, seed) for seed in range(2)]
    with jax.enable_x64(True):
        ours = _train(config, batches, dtype=jnp.float64)
        with programs_for("gpu"):
            theirs = _train(config, batches, dtype=jnp.float64)
        _assert_near(theirs.state.params, ours.state.params, 1e-9)
        _assert_near(theirs.state.batch_stats, ours.state.batch_stats, 1e-9)
        assert theirs.metrics == [pytest.approx(m, rel=1e-9) for m in ours.metrics]


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(
            model=ModelConfig(name="mobilenet_unet"),
            encoder=EncoderConfig(trainable=trainable),
            schedule=ScheduleConfig(average_decay=0.9),
        )
        for trainable in (False, True)
    ],
    ids=["frozen", "trainable"],
)
@tiny
def test_two_gpus_call_of_several_steps_is_a_cpus_in_float64(config, make_batch):
    """On GPUs, small arrays are vectors from step to step."""
    batches = [make_batch(2, 16, 16, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)

    def run(devices: int) -> tuple[TrainState, dict]:
        mesh = create_mesh(jax.devices()[:devices])
        state = create_state(config, _variables(config, jnp.float64), mesh)
        return create_programs(config, mesh).train_chunk(state, POS_WEIGHT, None, stacked)

    with jax.enable_x64(True):
        ours = run(1)
        with programs_for("gpu"):
            theirs = run(2)
        assert jax.tree.structure(theirs) == jax.tree.structure(ours)
        for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_gpu_packs_what_changes_and_is_no_kernel_of_a_convolution(made_for, trainable):
    config = TrainConfig(encoder=EncoderConfig(trainable=trainable))
    variables = functional.shapes(config.model)
    state = jax.eval_shape(functools.partial(initial_state, config), variables)
    vectors = small_arrays(config, state)
    if made_for == "cpu":
        assert vectors == {}
        return
    assert vectors.keys() == {"main/packed", "batch_stats/packed"} | (
        {"encoder/packed"} if trainable else set()
    )
    packed = {name for arrays in vectors.values() for name in arrays}
    assert {name for name in packed if name.startswith("encoder/")} == {
        name
        for name, array in (variables.params | variables.batch_stats).items()
        if trainable and name.startswith("encoder/") and array.ndim == 1
    }
    assert {name for name in variables.params if name not in packed} == {
        name
        for name, array in variables.params.items()
        if array.ndim == 4 or (name.startswith("encoder/") and not trainable)
    }


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.usefixtures("made_for")
def test_one_number_that_is_not_finite_is_found(value):
    gradients = {"a": jnp.ones((3, 3, 2, 4)), "b": jnp.ones(4)}
    assert all_finite((jnp.ones(()), gradients))
    assert not all_finite((jnp.asarray(value), gradients))
    assert not all_finite((jnp.ones(()), gradients | {"b": jnp.ones(4).at[2].set(value)}))


@tiny
def test_a_step_is_traced_once_whatever_the_learning_rate_and_pos_weight(monkeypatch, make_batch):
    traced = []

    def recorded(function):
        def record(*arguments, **keywords):
            traced.append(function.__name__)
            return function(*arguments, **keywords)

        return record

    for function in (functional.apply, functional.apply_train):
        monkeypatch.setattr(functional, function.__name__, recorded(function))
    mesh = create_mesh(jax.devices()[:2])
    steps = create_programs(UNET, mesh)
    state = create_state(UNET, _variables(UNET), mesh)
    for rate, weight in ((3e-3, 1.0), (1e-3, 2.3), (1e-4, 200.0)):
        rates = {"main": jax.device_put(jnp.asarray(rate, jnp.float32), replicated(mesh))}
        state, _ = steps.train_step(
            state._replace(learning_rates=rates), weight, make_batch(4, 16, 16)
        )
        variables = Variables(state.params, state.batch_stats)
        steps.validation_step(variables, weight, make_batch(4, 16, 16, seed=1), None)
    assert sorted(traced) == ["apply", "apply_train"]
    assert int(state.step) == 3


@tiny
def test_a_step_consumes_its_state_and_leaves_the_variables_alone(on_two_devices, make_batch):
    mesh, steps = on_two_devices
    variables = _variables(UNET)
    before = _host(variables)
    state = create_state(UNET, variables, mesh)
    steps.train_step(state, POS_WEIGHT, make_batch(2, 16, 16))
    assert all(array.is_deleted() for array in state.params.values())
    assert all(array.is_deleted() for array in state.batch_stats.values())
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert moments and all(leaf.is_deleted() for leaf in moments)
    _assert_identical(variables.params, before.params)
    _assert_identical(variables.batch_stats, before.batch_stats)


@tiny
def test_loss_falls_on_a_fixed_batch(on_two_devices, make_batch):
    mesh, steps = on_two_devices
    state, falling = create_state(UNET, _variables(UNET), mesh), []
    for _ in range(5):
        state, metrics = steps.train_step(state, POS_WEIGHT, make_batch(2, 16, 16))
        falling.append(float(metrics["loss"]))
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 0.95 * falling[0]
    assert int(state.step) == 5


@pytest.mark.parametrize("train", [False, True])
@tiny
def test_metrics_and_statistics_are_those_of_the_batch(on_two_devices, train, make_batch):
    mesh, steps = on_two_devices
    batch, variables = make_batch(2, 16, 16), _variables(UNET)
    images, masks = jnp.float32(batch.image) / 255, jnp.float32(batch.mask)
    if train:
        logits, batch_stats = jax.jit(functional.apply_train, static_argnums=0)(
            UNET.model, variables, images
        )
    else:
        logits = jax.jit(functional.apply, static_argnums=0)(UNET.model, variables, images)
    loss = losses.dice_bce(
        logits, masks, jnp.ones(2, bool), config=UNET.loss, pos_weight=POS_WEIGHT
    )
    dice = losses.hard_dice(logits, masks)
    if train:
        state, metrics = steps.train_step(create_state(UNET, variables, mesh), POS_WEIGHT, batch)
        _assert_near(state.batch_stats, batch_stats, 1e-4)
        dice = dice.mean()
    else:
        metrics = steps.validation_step(variables, POS_WEIGHT, batch, None)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["dice"], dice, rtol=1e-5)


@tiny
def test_padded_rows_of_an_evaluation_batch_change_nothing(on_two_devices, make_batch):
    _, steps = on_two_devices
    variables, batch, results = _variables(UNET), make_batch(2, 16, 16), []
    for filler in (0, 1):
        padded = Batch(
            np.concatenate([batch.image, np.full_like(batch.image, 255 * filler)]),
            np.concatenate([batch.mask, np.full_like(batch.mask, filler)]),
            np.array([True, True, False, False]),
            np.array([0, 1, -1, -1], np.int32),
        )
        results.append(_host(steps.validation_step(variables, POS_WEIGHT, padded, None)))
    alone = steps.validation_step(variables, POS_WEIGHT, batch, None)
    for result in results:
        np.testing.assert_allclose(result["loss"], alone["loss"], rtol=1e-6)
        np.testing.assert_allclose(result["dice"][:2], alone["dice"], rtol=1e-6)


def _encoder(arrays: dict) -> dict:
    return {name: array for name, array in arrays.items() if name.startswith("encoder/")}


def _steps_with_encoder(
    encoder: EncoderConfig, make_batch: Callable[..., Batch]
) -> tuple[Variables, TrainState]:
    """Two steps of a network with an encoder, negative zeros in it."""
    config = TrainConfig(
        model=ModelConfig(name="mobilenet_unet"),
        encoder=encoder,
        optimizer=OptimizerConfig(learning_rate=3e-3),
    )
    variables = _variables(config)
    for name, array in _encoder(variables.params).items():
        variables.params[name] = array.at[..., 0].set(-0.0)
    before = _host(variables)
    mesh = create_mesh(jax.devices()[:1])
    steps = create_programs(config, mesh)
    state = create_state(config, variables, mesh)
    for seed in range(2):
        state, _ = steps.train_step(state, POS_WEIGHT, make_batch(2, 32, 32, seed))
    return before, _host(state)


def _moved(before: dict, after: dict) -> set[str]:
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}


@pytest.mark.usefixtures("tiny_and_real")
def test_a_frozen_encoder_stays_bit_for_bit(make_batch):
    before, after = _steps_with_encoder(EncoderConfig(), make_batch)
    _assert_identical(_encoder(before.params), _encoder(after.params))
    _assert_identical(_encoder(before.batch_stats), _encoder(after.batch_stats))
    kernels = {name for name in before.params if name.endswith("kernel")}
    assert _moved(before.params, after.params) >= kernels - _encoder(before.params).keys()
    assert _moved(before.batch_stats, after.batch_stats)


@pytest.mark.usefixtures("tiny_and_real")
def test_a_frozen_encoder_with_batch_statistics_drifts_in_them_alone(make_batch):
    before, after = _steps_with_encoder(EncoderConfig(frozen_batch_norm="batch"), make_batch)
    _assert_identical(_encoder(before.params), _encoder(after.params))
    assert _moved(before.batch_stats, after.batch_stats) == before.batch_stats.keys()


@pytest.mark.usefixtures("tiny_and_real")
def test_a_trainable_encoder_learns_at_its_own_rate(make_batch):
    before, after = _steps_with_encoder(
        EncoderConfig(trainable=True, learning_rate=1e-5), make_batch
    )
    change = {
        name: np.abs(after.params[name] - before.params[name]).max() for name in before.params
    }
    encoder = _encoder(change)
    # Adam moves by at most about its rate per step.
    assert 5e-6 < max(encoder.values()) < 3e-5
    assert 1.5e-3 < max(change.values()) < 9e-3
    assert _moved(before.batch_stats, after.batch_stats) == before.batch_stats.keys()


@pytest.mark.usefixtures("tiny_and_real")
def test_every_step_drops_out_differently_and_a_repeat_the_same(make_batch):
    config = TrainConfig(optimizer=OptimizerConfig(learning_rate=1e-30))
    mesh = create_mesh(jax.devices()[:1])
    steps, variables = create_programs(config, mesh), _variables(config)
    runs = []
    for _ in range(2):
        state, runs = create_state(config, variables, mesh), [*runs, []]
        for _ in range(2):
            state, metrics = steps.train_step(state, POS_WEIGHT, make_batch(2, 32, 32))
            runs[-1].append(float(metrics["loss"]))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


@tiny
def test_state_arrays_lie_whole_on_every_device():
    mesh = create_mesh()
    state = create_state(UNET, _variables(UNET), mesh)
    assert mesh.size == 8
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding == replicated(mesh)


@pytest.mark.parametrize(
    "trainable",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["frozen encoder", "trainable encoder"],
)
def test_a_loop_runs_every_convolution_of_a_step_fast(trainable, make_batch):
    """In a loop, XLA's CPU backend hands no other than NHWC × HWIO → NHWC to Eigen."""
    config = TrainConfig(encoder=EncoderConfig(weights="none", trainable=trainable))
    mesh = create_mesh(jax.devices()[:1])
    state = jax.eval_shape(
        functools.partial(initial_state, config), functional.shapes(config.model)
    )
    lowered = create_programs(config, mesh).train_step.lower(
        state, POS_WEIGHT, make_batch(2, 256, 256)
    )
    found = re.findall(r"stablehlo.convolution\(.*", lowered.as_text())
    assert len(found) > 60
    for line in found:
        assert "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line
        assert "feature_group_count = 1" in line and "batch_group_count = 1" in line
        assert "reverse" not in line or "true" not in line


@tiny
def test_averages_are_moving_means_of_what_learns(make_batch):
    schedule = ScheduleConfig(average_decay=0.2)
    config = dataclasses.replace(UNET, schedule=schedule)
    mesh = create_mesh(jax.devices()[:2])
    steps, state = create_programs(config, mesh), create_state(config, _variables(config), mesh)
    average = _host(state.params | state.batch_stats)
    for step in range(4):
        state, _ = steps.train_step(state, POS_WEIGHT, make_batch(4, 16, 16, seed=step))
        decay = min(0.2, (1 + step) / (10 + step))
        now = _host(state.params | state.batch_stats)
        average = {name: decay * average[name] + (1 - decay) * now[name] for name in now}
    network = network_of(state)
    _assert_near(network.params | network.batch_stats, average, 1e-6)
    assert any(
        not np.array_equal(network.params[name], state.params[name]) for name in state.params
    )


def test_a_frozen_encoder_has_no_averages(make_batch):
    config = dataclasses.replace(DEFAULT, schedule=ScheduleConfig(average_decay=0.9))
    state = jax.eval_shape(
        functools.partial(initial_state, config), functional.shapes(config.model)
    )
    assert not any(name in state.averages for name in state.params if name.startswith("encoder/"))
    assert all(name in state.averages for name in state.params if not name.startswith("encoder/"))


@tiny
def test_averaging_leaves_training_as_it_is(make_batch):
    batches = [make_batch(4, 16, 16, seed=seed) for seed in range(3)]
    averaging = dataclasses.replace(UNET, schedule=ScheduleConfig(average_decay=0.9))
    plain, averaged = _train(UNET, batches), _train(averaging, batches)
    _assert_near(averaged.state.params, plain.state.params, 1e-6)
    assert network_of(plain.state).params == plain.state.params


@tiny
def test_rates_follow_the_cosine_step_by_step(make_batch):
    """Plain gradient descent of a known rate: what one step moves is the rate's share of it."""
    schedule = ScheduleConfig(epochs=2, decay="cosine", warmup_epochs=1)
    config = dataclasses.replace(UNET, schedule=schedule)
    mesh = create_mesh(jax.devices()[:1])
    batch = make_batch(4, 16, 16)
    plain, _ = create_programs(UNET, mesh).train_step(
        create_state(UNET, _variables(UNET), mesh), 1.0, batch
    )
    steps = create_programs(config, mesh, steps_per_epoch=4)
    state, _ = steps.train_step(create_state(config, _variables(config), mesh), 1.0, batch)
    before = _host(_variables(UNET).params)
    for name, array in before.items():
        whole, part = np.asarray(plain.params[name]) - array, np.asarray(state.params[name])
        np.testing.assert_allclose(part - array, whole / 5, atol=2e-7)


@tiny
def test_soft_masks_are_shares_in_the_loss_and_whole_pixels_in_the_dice(make_batch):
    hard = make_batch(4, 16, 16)
    soft = hard._replace(mask=np.where(hard.mask, 200, 60).astype(np.uint8))
    config = dataclasses.replace(UNET, data=DataConfig(soft_masks=True))
    as_shares = _train(config, [hard._replace(mask=(255 * hard.mask).astype(np.uint8))])
    as_pixels = _train(UNET, [hard])
    assert as_shares.metrics == as_pixels.metrics
    in_between = _train(config, [soft])
    assert in_between.metrics[0]["dice"] == as_pixels.metrics[0]["dice"]
    assert in_between.metrics[0]["loss"] != as_pixels.metrics[0]["loss"]


@tiny
def test_grey_levels_are_varied_in_training_alone(make_batch):
    augmentation = AugmentationConfig(gain=0.5, photometric_probability=1.0)
    config = dataclasses.replace(UNET, augmentation=augmentation)
    batch = make_batch(4, 16, 16)
    whole = jax.tree.map(lambda value: np.full(4, value), UNCHANGED)
    darker = batch._replace(photometric=whole._replace(gain=np.full(4, 0.5, np.float32)))
    halved = batch._replace(image=batch.image // 2 * 1)
    even = batch._replace(image=batch.image // 2 * 2, photometric=darker.photometric)
    ours, theirs = _train(config, [even]), _train(UNET, [halved])
    assert ours.metrics[0]["loss"] == pytest.approx(theirs.metrics[0]["loss"], rel=1e-5)
