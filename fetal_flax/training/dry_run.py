"""`train --dry-run`: builds everything, runs one step, prints the plan and writes nothing."""

import time

import jax
import rich.console

from fetal_flax import summary
from fetal_flax.config import TrainConfig
from fetal_flax.models.complexity import summarize
from fetal_flax.training.compile import create_state
from fetal_flax.training.epoch import open_batches
from fetal_flax.training.setup import describe, prepare
from fetal_flax.training.sharding import check_devices
from fetal_flax.training.step import TrainState


def dry_run(config: TrainConfig) -> None:
    """Prints parameters by part, data set sizes, devices, memory and the first step's result.

    Raises:
        InputError: What a run of this config would raise.
    """
    check_devices(config.model)
    console = rich.console.Console()
    setup = prepare(config)
    console.print(describe(setup), highlight=False)
    parts = summarize(config.model, config.encoder.trainable, image_size=config.data.image_size)
    console.print(summary.render([parts]))

    state = create_state(config, setup.variables, setup.mesh)
    state_bytes = _bytes(state)
    with open_batches(setup, start_step=0, total_steps=setup.steps_per_epoch) as batches:
        items = next(batches)
    compiled = setup.compiled_chunk.compiled
    memory = compiled.memory_analysis()
    temporaries = f"{memory.temp_size_in_bytes / 1e6:.0f} MB" if memory else "unknown"
    start = time.perf_counter()
    _, metrics = jax.block_until_ready(setup.train_chunk(state, items))
    step_seconds = (time.perf_counter() - start) / metrics["loss"].size
    console.print(
        f"memory on each device: state {state_bytes / 1e6:.0f} MB, temporaries {temporaries} "
        f"(XLA's estimate); compiled in {setup.compiled_chunk.seconds:.1f} s\n"
        f"first step: loss {_first(metrics['loss']):.4f}, Dice {_first(metrics['dice']):.4f}, "
        f"{step_seconds:.2f} s a step\n"
        f"a run takes {config.schedule.epochs} epochs of {setup.steps_per_epoch} steps at most",
        highlight=False,
    )


def _first(metric: jax.Array) -> float:
    return float(metric.ravel()[0])


def _bytes(state: TrainState) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(state))
