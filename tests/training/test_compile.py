"""What a start compiles ahead of its first step, and what a GPU would be given to compile."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest

from fetal_flax._util.backend import programs_for
from fetal_flax.config import EncoderConfig, ModelConfig, TrainConfig
from fetal_flax.errors import InputError
from fetal_flax.models import functional
from fetal_flax.training.compile import BackgroundCompilation, create_programs
from fetal_flax.training.run import train
from fetal_flax.training.setup import prepare
from fetal_flax.training.sharding import create_mesh
from fetal_flax.training.step import initial_state


@pytest.mark.usefixtures("tiny_network")
def test_a_run_traces_its_training_step_once_and_ahead_of_time(small_config, tmp_path, monkeypatch):
    apply_train, traced = functional.apply_train, []

    def counted(*arguments, **keywords):
        traced.append(None)
        return apply_train(*arguments, **keywords)

    monkeypatch.setattr(functional, "apply_train", counted)
    setup = prepare(small_config())
    assert isinstance(setup.compiled_chunk.compiled, jax.stages.Compiled)
    assert setup.compiled_chunk.seconds > 0
    assert len(traced) == 1
    train(small_config(epochs=1), tmp_path / "run")
    assert len(traced) == 2


def test_what_is_wrong_with_a_step_is_said_where_it_is_called():
    def refuse() -> jax.stages.Compiled:
        raise InputError("images don't fit")

    step = BackgroundCompilation(refuse)
    with pytest.raises(InputError, match="don't fit"):
        step()


def training_step_for_cuda(model: ModelConfig, make_batch) -> str:
    """Returns the program of a training step of this network, as XLA takes it; needs no GPU."""
    config = TrainConfig(model=model, encoder=EncoderConfig(weights="none"))
    with programs_for("gpu"):
        step = create_programs(config, create_mesh(jax.devices()[:1])).train_step
        state = jax.eval_shape(
            functools.partial(initial_state, config), functional.shapes(config.model)
        )
        traced = step.trace(state, jax.ShapeDtypeStruct((), np.float32), make_batch(2, 64, 64))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def inference_for_cuda(model: ModelConfig) -> str:
    """Returns the program of a folded network, likewise."""
    infer = jax.jit(functional.infer, static_argnums=0)
    images = jax.ShapeDtypeStruct((2, 64, 64, model.in_channels), np.float32)
    with programs_for("gpu"):
        fold = functools.partial(functional.fold, model)
        folded = jax.eval_shape(fold, functional.shapes(model))
        return infer.trace(model, folded, images).lower(lowering_platforms=("cuda",)).as_text()


def widest_sum_in_bfloat16(program: str) -> int:
    """Returns how many numbers are added up at once in bfloat16, at most."""
    sums = re.findall(
        r"stablehlo\.reduce\(.*applies stablehlo\.add across dimensions = \[([\d, ]*)\] : "
        r"\(tensor<([\dx]*)xbf16>",
        program,
    )
    widths = [1]
    for dimensions, shape in sums:
        sides = [int(side) for side in shape.split("x")]
        widths.append(math.prod(sides[int(each)] for each in dimensions.split(",")))
    return max(widths)


def test_the_widest_sum_in_bfloat16_is_found():
    def add_up(x: jax.Array) -> jax.Array:
        return jax.lax.reduce(x, np.zeros((), x.dtype), jax.lax.add, (0, 2))

    shape = jax.ShapeDtypeStruct((3, 5, 7), jax.numpy.bfloat16)
    assert widest_sum_in_bfloat16(jax.jit(add_up).lower(shape).as_text()) == 21


@pytest.mark.parametrize("variant", ["described", pytest.param("compact", marks=pytest.mark.slow)])
def test_a_gpus_training_step_sums_in_float32_and_calls_nothing_that_it_lacks(variant, make_batch):
    program = training_step_for_cuda(ModelConfig(variant=variant, dtype="bfloat16"), make_batch)
    assert "bf16" in program and "f64" not in program
    assert "custom_call" not in program
    # The form of a depthwise convolution that is for CPUs sums its gradient in a loop.
    assert "stablehlo.while" not in program
    assert widest_sum_in_bfloat16(program) == 1


@pytest.mark.parametrize("precision", ["default", "float32"])
def test_float32_products_on_a_gpu_are_tf32_or_full_as_the_setting_says(precision, make_batch):
    model = ModelConfig(name="unet", base_width=4, matmul_precision=precision)
    for program in (training_step_for_cuda(model, make_batch), inference_for_cuda(model)):
        assert ("HIGHEST" in program) == (precision == "float32")
        assert ("DEFAULT" in program) == (precision == "default")


def test_on_a_cpu_matmul_precision_changes_nothing():
    model = ModelConfig(name="unet", base_width=4)
    images = jax.ShapeDtypeStruct((2, 32, 32, 1), np.float32)
    programs = [
        jax.jit(functional.apply, static_argnums=0)
        .lower(dataclasses.replace(model, matmul_precision=each), functional.shapes(model), images)
        .as_text()
        for each in ("default", "float32")
    ]
    assert programs[0] == programs[1]


def test_a_gpus_inference_sums_in_float32_and_calls_nothing_that_it_lacks():
    program = inference_for_cuda(ModelConfig(dtype="bfloat16"))
    assert "bf16" in program and "f64" not in program
    assert "custom_call" not in program and "stablehlo.while" not in program
    assert widest_sum_in_bfloat16(program) == 1
