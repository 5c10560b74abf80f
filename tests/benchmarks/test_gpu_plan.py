"""benchmarks/gpu_plan.py: what a GPU's program costs, on paper and of one that is compiled."""

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fetal_flax.config import ModelConfig
from fetal_flax.models.complexity import summarize

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MAP = 2 * 8 * 8 * 4 * 2
"""Bytes of the map in the program below."""
PROGRAM = """\
HloModule jit_train, is_scheduled=true

FileNames
1 "/project/package/training/step.py"
2 "/project/package/models/layers.py"
3 "/elsewhere/optax/update.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=10 end_line=10 column=0 end_column=1}
2 {file_name_id=2 function_name_id=1 line=20 end_line=20 column=0 end_column=1}
3 {file_name_id=3 function_name_id=1 line=30 end_line=30 column=0 end_column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

%half (parameter_0: bf16[2,8,8,4], parameter_1: bf16[2,8,8,4]) -> bf16[2,8,8,2] {
  %parameter_0 = bf16[2,8,8,4]{3,2,1,0} parameter(0)
  %parameter_1 = bf16[2,8,8,4]{3,2,1,0} parameter(1)
  %add.1 = bf16[2,8,8,4]{3,2,1,0} add(%parameter_0, %parameter_1)
  ROOT %slice.1 = bf16[2,8,8,2]{3,2,1,0} slice(%add.1), slice={[0:2], [0:8], [0:8], [0:2]}
}

%in_place (parameter_0.1: f32[6], parameter_1.1: s32[], parameter_2.1: f32[1]) -> f32[6] {
  %parameter_0.1 = f32[6]{0} parameter(0)
  %parameter_1.1 = s32[] parameter(1)
  %parameter_2.1 = f32[1]{0} parameter(2)
  ROOT %update.1 = f32[6]{0} dynamic-update-slice(%parameter_0.1, %parameter_2.1, %parameter_1.1)
}

%product (parameter_0.2: bf16[128,4], parameter_1.2: bf16[4,4]) -> bf16[128,4] {
  %parameter_0.2 = bf16[128,4]{1,0} parameter(0)
  %parameter_1.2 = bf16[4,4]{1,0} parameter(1)
  ROOT %dot.1 = bf16[128,4]{1,0} dot(%parameter_0.2, %parameter_1.2), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
}

%body (state: (s32[], bf16[2,8,8,4], f32[6])) -> (s32[], bf16[2,8,8,4], f32[6]) {
  %state = (s32[], bf16[2,8,8,4]{3,2,1,0}, f32[6]{0}) parameter(0)
  %step.1 = s32[] get-tuple-element(%state), index=0
  %map.1 = bf16[2,8,8,4]{3,2,1,0} get-tuple-element(%state), index=1
  %losses.1 = f32[6]{0} get-tuple-element(%state), index=2
  %kernel.1 = bf16[4,3,3,4]{3,2,1,0} constant({...})
  %convolved.1 = (bf16[2,8,8,4]{3,2,1,0}, u8[0]{0}) custom-call(%map.1, %kernel.1), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convForward", metadata={op_name="conv" stack_frame_id=3}
  %convolved.2 = bf16[2,8,8,4]{3,2,1,0} get-tuple-element(%convolved.1), index=0
  %half.1 = bf16[2,8,8,2]{3,2,1,0} fusion(%map.1, %convolved.2), kind=kLoop, calls=%half, \
metadata={op_name="half" stack_frame_id=1}
  %sum.1 = f32[1]{0} custom-call(%half.1), custom_call_target="sum"
  %all.1 = f32[1]{0} all-reduce(%sum.1), to_apply=%adder
  %losses.2 = f32[6]{0} fusion(%losses.1, %step.1, %all.1), kind=kLoop, calls=%in_place
  %rows.1 = bf16[128,4]{1,0} bitcast(%convolved.2)
  %small.1 = bf16[4,4]{1,0} constant({...})
  %product.1 = bf16[128,4]{1,0} fusion(%rows.1, %small.1), kind=kCustom, calls=%product
  %map.2 = bf16[2,8,8,4]{3,2,1,0} bitcast(%product.1)
  ROOT %next.1 = (s32[], bf16[2,8,8,4]{3,2,1,0}, f32[6]{0}) tuple(%step.1, %map.2, %losses.2)
}

ENTRY %main (state.1: (s32[], bf16[2,8,8,4], f32[6])) -> (s32[], bf16[2,8,8,4], f32[6]) {
  %state.1 = (s32[], bf16[2,8,8,4]{3,2,1,0}, f32[6]{0}) parameter(0)
  %copy.1 = f32[] copy(%state.1)
  ROOT %while.1 = (s32[], bf16[2,8,8,4]{3,2,1,0}, f32[6]{0}) while(%state.1), condition=%less, \
body=%body, backend_config={"known_trip_count":{"n":"6"}}
}
"""


@pytest.fixture(scope="module")
def kernels() -> dict[str, Any]:
    """Those of a step of the program above, by name."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(BENCHMARKS))
        module = importlib.import_module("gpu_program")
    return {kernel.name: kernel for kernel in module.Program(PROGRAM, "/project/package").step()}


def test_a_step_is_the_loops_body_without_what_is_no_kernel(kernels):
    assert set(kernels) == {"convolved.1", "half.1", "sum.1", "all.1", "losses.2", "product.1"}
    assert [name for name, kernel in kernels.items() if kernel.collective] == ["all.1"]


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("convolved.1", 2 * MAP + 4 * 3 * 3 * 4 * 2),
        # Half of each of two maps is read, also through the sum, and half of one is written.
        ("half.1", 3 * MAP // 2),
        # Step and number are read; one number of six is written, in place.
        ("losses.2", 4 + 4 + 4),
        ("all.1", 4),
        ("product.1", 2 * MAP + 4 * 4 * 2),
    ],
)
def test_bytes_are_what_is_read_and_written(kernels, name, moved):
    assert kernels[name].bytes == moved


def test_operations_are_those_of_convolutions_and_products(kernels):
    pixels = 2 * 8 * 8
    expected = {"convolved.1": 2 * pixels * 4 * 9 * 4, "product.1": 2 * pixels * 4 * 4}
    assert {n: k.flops for n, k in kernels.items() if k.flops} == expected


def test_lines_are_the_projects_from_the_inside_out(kernels):
    assert kernels["convolved.1"].lines == ("models/layers.py:20", "training/step.py:10")
    assert kernels["half.1"].lines == ("training/step.py:10",)
    assert kernels["sum.1"].lines == ()


@pytest.mark.slow
@pytest.mark.parametrize("inference", [False, True])
def test_a_network_is_compiled_for_gpus_that_are_not_there(tmp_path, inference):
    if not importlib.metadata.entry_points(group="jax_plugins"):
        pytest.skip("no compiler for GPUs is installed: pip install -e '.[gpu-plan]'")
    figures, program = tmp_path / "plan.json", tmp_path / "program.txt"
    command = [sys.executable, BENCHMARKS / "gpu_plan.py", "--network", "unet", "--size", "128"]
    command += ["--devices", "2", "--batch", "4", "--json", figures, "--hlo", program]
    command += ["--inference"] if inference else []
    paths = os.pathsep.join(filter(None, (str(BENCHMARKS.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "XLA_FLAGS": ""}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    plan = json.loads(figures.read_text())
    assert program.read_text().startswith("HloModule")
    parts = summarize(ModelConfig(name="unet"), encoder_trainable=True, image_size=(128, 128))
    forward = 2 * parts.total.macs
    if inference:
        assert plan["flops_per_image"] == pytest.approx(forward, rel=0.02)
        assert plan["collectives"] == 0
    else:
        # The first convolution has no gradient by its input.
        assert 2.9 * forward < plan["flops_per_image"] < 3.02 * forward
        # Gradients of four bytes each are summed over the devices, beside statistics.
        summed = plan["collective_bytes"]
        assert 4 * parts.total.parameters < summed < 4.1 * parts.total.parameters
    assert 0 < plan["temp_bytes"] < plan["peak_bytes"]
    assert plan["limited_by"] == max(plan["seconds"], key=plan["seconds"].get)
    lines = [kernel["lines"][0] for kernel in plan["top"] if kernel["lines"]]
    assert any(line.startswith("models/") for line in lines)
    assert f"kernels               {plan['kernels']}" in ran.stdout
