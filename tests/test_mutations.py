"""Each classic porting mistake, made alone in a copy of the project, turns a test red."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


BLOCKS = ("tests/models/test_blocks.py", "-k")
NETWORK = ("tests/parity/test_compare.py", "-k", "small_unet_for_rgb")
MUTATIONS = {
    "mean and variance swapped": Mutation(
        "fetal_flax/conversion/names.py",
        '"running_mean": "mean", "running_var": "var"',
        '"running_mean": "var", "running_var": "mean"',
        NETWORK,
    ),
    "transposed kernel flipped": Mutation(
        "fetal_flax/models/layers.py",
        "@ kernel.reshape(inputs, -1)",
        "@ kernel[:, ::-1, ::-1].reshape(inputs, -1)",
        NETWORK,
    ),
    "SAME padding": Mutation(
        "fetal_flax/models/convolution.py",
        "padding=((rows, rows), (columns, columns))",
        'padding="SAME"',
        (*BLOCKS, "mobilenet_taps"),
    ),
    "Flax's default momentum": Mutation(
        "fetal_flax/models/layers.py", "momentum = 0.1", "momentum = 0.01", NETWORK
    ),
    "running variance biased": Mutation(
        "fetal_flax/models/layers.py",
        "unbiased = var * (count / (count - 1))",
        "unbiased = var * 1.0",
        NETWORK,
    ),
    "AdamW for L2": Mutation(
        "fetal_flax/training/optimizer.py",
        "        optax.add_decayed_weights(config.l2),\n"
        "        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),\n",
        "        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),\n"
        "        optax.add_decayed_weights(config.l2),\n",
        ("tests/training/test_optimizer.py", "-k", "ten_steps"),
    ),
    "GroupNorm's epsilon": Mutation(
        "fetal_flax/models/aspp.py", "epsilon=1e-5", "epsilon=1e-6", (*BLOCKS, "aspp_without")
    ),
    "two values a group in the pooled branch": Mutation(
        "fetal_flax/models/mobilenet_aspp_se_unet.py",
        "pool_groups=8,",
        "pool_groups=32,",
        ("tests/models/test_mobilenet_aspp_se_unet.py", "-k", "pooled_branch"),
    ),
    "a separable convolution without its dilation": Mutation(
        "fetal_flax/models/layers.py",
        "size, dilation=dilation, depthwise=True",
        "size, depthwise=True",
        (*BLOCKS, "compact_aspp"),
    ),
    "ReLU for ReLU6": Mutation(
        "fetal_flax/models/mobilenet_v2.py",
        "y = nnx.relu6(self.depthwise",
        "y = nnx.relu(self.depthwise",
        ("tests/parity/test_compare.py", "-k", "taps"),
    ),
    "the described ReLU in the published block": Mutation(
        "fetal_flax/models/blocks.py",
        "if not self.relu_after_sum:",
        "if self.relu_after_sum:",
        (*BLOCKS, "residual_se"),
    ),
    "skip and upsampled map exchanged": Mutation(
        "fetal_flax/models/decoder.py",
        "(skip, x) if self.skip_first else (x, skip)",
        "(x, skip) if self.skip_first else (skip, x)",
        NETWORK,
    ),
    "Dice per image for Dice over the batch": Mutation(
        "fetal_flax/training/losses.py", '== "batch"', '!= "batch"', NETWORK
    ),
    "a plateau one epoch early": Mutation(
        "fetal_flax/training/schedule.py",
        "self.bad_epochs + 1 <= config.patience",
        "self.bad_epochs + 1 < config.patience",
        ("tests/training/test_schedule.py",),
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mutated") / "project"
    ignored = shutil.ignore_patterns(".*", "runs", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


def _run(copy: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Runs tests of the copy on the copy's package."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "slow or not slow", *tests]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_turns_a_test_red(copy, name):
    mutation = MUTATIONS[name]
    path = copy / mutation.file
    source = path.read_text()
    assert source.count(mutation.right) == 1
    try:
        path.write_text(source.replace(mutation.right, mutation.wrong))
        result = _run(copy, mutation.tests)
    finally:
        path.write_text(source)
    # 1 is a failed test; anything else would be a test that could not run.
    assert result.returncode == 1, result.stdout + result.stderr
    assert "AssertionError" in result.stdout or "assert " in result.stdout


@pytest.mark.slow
def test_without_a_mistake_a_copys_tests_pass(copy):
    """Some of them, and that they are the copy's; all of them pass outside of it."""
    result = _run(copy, NETWORK)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (
        str(copy)
        in subprocess.run(
            [sys.executable, "-c", "import fetal_flax; print(fetal_flax.__file__)"],
            cwd=copy,
            capture_output=True,
            text=True,
        ).stdout
    )
