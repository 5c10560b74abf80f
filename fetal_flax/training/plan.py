"""`train --dry-run`: builds everything, runs one step, prints the plan and writes nothing."""

import time

import jax
import rich.console

from fetal_flax import summary
from fetal_flax.config import TrainConfig
from fetal_flax.models.summary import summarize
from fetal_flax.training import loop
from fetal_flax.training.step import TrainState, create_state


def dry_run(config: TrainConfig) -> None:
    """Prints parameters by part, data set sizes, devices, memory and the first step's result.

    Raises:
        InputError: What a run of this config would raise.
    """
    console = rich.console.Console()
    run = loop.prepare(config)
    console.print(loop.describe(run), highlight=False)
    parts = summarize(config.model, config.encoder.trainable, image_size=config.data.image_size)
    console.print(summary.render([parts]))

    state = create_state(config, run.variables, run.mesh)
    state_bytes = _bytes(state)
    with loop.training_batches_on_device(run, start_step=0, total_steps=1) as batches:
        batch = next(batches)
    start = time.perf_counter()
    compiled = run.steps.train.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    temporaries = f"{memory.temp_size_in_bytes / 1e6:.0f} MB" if memory else "unknown"
    start = time.perf_counter()
    _, metrics = jax.block_until_ready(compiled(state, batch))
    step_seconds = time.perf_counter() - start
    console.print(
        f"memory on each device: state {state_bytes / 1e6:.0f} MB, temporaries {temporaries} "
        f"(XLA's estimate); compiled in {compile_seconds:.1f} s\n"
        f"first step: loss {float(metrics['loss']):.4f}, Dice {float(metrics['dice']):.4f}, "
        f"{step_seconds:.2f} s\n"
        f"a run takes {config.schedule.epochs} epochs of {run.steps_per_epoch} steps at most",
        highlight=False,
    )


def _bytes(state: TrainState) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(state))
