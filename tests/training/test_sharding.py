"""What a run refuses to compute on."""

import dataclasses
import os
import subprocess
import sys

import pytest

from fetal_flax.config import ModelConfig
from fetal_flax.errors import InputError
from fetal_flax.training.run import train

CHECK = """
from fetal_flax.config import ModelConfig
from fetal_flax.errors import InputError
from fetal_flax.training.sharding import check_devices
try:
    check_devices(ModelConfig())
except InputError as error:
    print(error)
else:
    print("accepted")
"""


@pytest.mark.parametrize(
    ("asked_for", "said"),
    [
        ("", "JAX's plugin xla_cuda99 is installed, but no device of its answers"),
        ("cpu", "accepted"),
        ("cuda", "JAX finds no device to compute on (JAX_PLATFORMS is cuda)"),
    ],
)
def test_no_run_is_on_the_cpu_in_silence_beside_a_plugin_without_gpu(tmp_path, asked_for, said):
    """In a process of its own, with a plugin that finds no driver."""
    (tmp_path / "cuda99.py").write_text("def initialize(): raise RuntimeError('no driver')")
    described = tmp_path / "cuda99-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: cuda99\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[jax_plugins]\nxla_cuda99 = cuda99\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {"JAX_PLATFORMS": asked_for, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    ran = subprocess.run(
        [sys.executable, "-c", CHECK], env=os.environ | environment, capture_output=True, text=True
    )
    assert ran.stdout.startswith(said), ran.stderr


def test_bfloat16_on_a_cpu_is_refused_before_anything_is_written(small_config, tmp_path):
    model = ModelConfig(name="unet", base_width=4, dtype="bfloat16")
    with pytest.raises(InputError, match=r"model\.dtype is bfloat16.*use float32"):
        train(dataclasses.replace(small_config(), model=model), tmp_path / "run")
    assert not (tmp_path / "run").exists()
