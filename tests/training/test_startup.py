"""What a start compiles, and what the next one finds of it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from fetal_flax.config import DataConfig, ModelConfig, ScheduleConfig, TrainConfig
from fetal_flax.errors import InputError
from fetal_flax.training import executables
from fetal_flax.training.sharding import create_mesh
from fetal_flax.training.startup import AheadOfTime

CONFIG = TrainConfig(
    model=ModelConfig(name="unet", base_width=4),
    data=DataConfig(image_size=(32, 32)),
    schedule=ScheduleConfig(batch_size=2),
)
START = """
import dataclasses, json, sys
import jax, numpy as np
from fetal_flax.data.pipeline import Batch
from fetal_flax.models import functional
from fetal_flax.training.sharding import create_mesh, batch_sharding, replicated
from fetal_flax.training.startup import compile_train_step
from fetal_flax.training.step import create_state, create_steps
from tests.training.test_startup import CONFIG

traced, apply = [], functional.apply
functional.apply = lambda *a, **k: (traced.append(1), apply(*a, **k))[1]
config, mesh = dataclasses.replace(CONFIG, name=sys.argv[1]), create_mesh()
step = compile_train_step(
    config, create_steps(config, mesh), mesh, records=0, steps_per_dispatch=1
)
state = first = create_state(config, functional.init(config.model, 0), mesh)
rng = np.random.default_rng(0)
batch = Batch(
    rng.integers(0, 256, (2, 32, 32, 1), np.uint8), rng.integers(0, 2, (2, 32, 32, 1), np.uint8),
    np.ones(2, bool), np.arange(2, dtype=np.int32),
)
batch = jax.device_put(batch, batch_sharding(mesh))
losses = []
for weight in (2.0, 2.0, 3.0):
    state, metrics = step(state, jax.device_put(np.float32(weight), replicated(mesh)), batch)
    losses.append(float(metrics["loss"]))
consumed = all(array.is_deleted() for array in first.params.values())
print(json.dumps({"traced": len(traced), "losses": losses, "consumed": consumed}))
"""


def start(cache: Path, name: str) -> dict:
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-c", START, name]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_start_of_a_run_does_the_same_without_a_trace(tmp_path):
    first, second = start(tmp_path, "run"), start(tmp_path, "run")
    assert (first["traced"], second["traced"]) == (1, 0)
    assert first["consumed"] and second["consumed"]
    assert second["losses"] == first["losses"]
    # What JAX's cache gave can't be written again; it would fail when it runs.
    (kept,) = (tmp_path / "steps").iterdir()
    assert start(tmp_path, "same program") == first
    assert list((tmp_path / "steps").iterdir()) == [kept]
    kept.write_bytes(kept.read_bytes()[:1000])
    assert start(tmp_path, "run") == first


def _key(config: TrainConfig, rows: int = 2) -> str:
    arguments = (jax.ShapeDtypeStruct((rows,), np.int32),)
    return executables._key(config, create_mesh(jax.devices()[:1]), arguments)


def test_a_step_is_named_after_all_that_it_is_made_of(monkeypatch, tmp_path):
    keys = {_key(CONFIG), _key(CONFIG, rows=3), _key(dataclasses.replace(CONFIG, seed=1))}
    with jax.default_matmul_precision("float32"), jax.enable_x64(True):
        keys.add(_key(CONFIG))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    keys.add(_key(CONFIG))
    monkeypatch.setattr("fetal_flax.__file__", str(tmp_path / "__init__.py"))
    keys.add(_key(CONFIG))
    (tmp_path / "losses.py").touch()
    keys.add(_key(CONFIG))
    assert len(keys) == 7
    assert _key(CONFIG) == _key(CONFIG)


def test_what_is_wrong_with_a_step_is_said_where_it_is_called():
    def refuse() -> jax.stages.Compiled:
        raise InputError("images don't fit")

    step = AheadOfTime(refuse)
    with pytest.raises(InputError, match="don't fit"):
        step()
