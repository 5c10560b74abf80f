"""`train --dry-run`: builds everything, runs one step, prints the plan and writes nothing."""

import time

import jax
import rich.console

from fetal_flax import summary
from fetal_flax.config import TrainConfig
from fetal_flax.models.summary import summarize
from fetal_flax.training.epochs import open_training
from fetal_flax.training.preparation import describe, prepare
from fetal_flax.training.step import TrainState, create_state


def dry_run(config: TrainConfig) -> None:
    """Prints parameters by part, data set sizes, devices, memory and the first step's result.

    Raises:
        InputError: What a run of this config would raise.
    """
    console = rich.console.Console()
    run = prepare(config)
    console.print(describe(run), highlight=False)
    parts = summarize(config.model, config.encoder.trainable, image_size=config.data.image_size)
    console.print(summary.render([parts]))

    state = create_state(config, run.variables, run.mesh)
    state_bytes = _bytes(state)
    with open_training(run, start_step=0, total_steps=run.steps_per_epoch) as training:
        work = next(training.work)
    arguments = state, *training.constants, work
    compiled = run.train_step.compiled
    memory = compiled.memory_analysis()
    temporaries = f"{memory.temp_size_in_bytes / 1e6:.0f} MB" if memory else "unknown"
    start = time.perf_counter()
    _, metrics = jax.block_until_ready(compiled(*arguments))
    step_seconds = time.perf_counter() - start
    console.print(
        f"memory on each device: state {state_bytes / 1e6:.0f} MB, temporaries {temporaries} "
        f"(XLA's estimate); compiled in {run.train_step.seconds:.1f} s\n"
        f"first step: loss {_first(metrics['loss']):.4f}, Dice {_first(metrics['dice']):.4f}, "
        f"{step_seconds / training.steps:.2f} s a step\n"
        f"a run takes {config.schedule.epochs} epochs of {run.steps_per_epoch} steps at most",
        highlight=False,
    )


def _first(metric: jax.Array) -> float:
    return float(metric.ravel()[0])


def _bytes(state: TrainState) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(state))
