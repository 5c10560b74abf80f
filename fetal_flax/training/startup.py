"""What a run has compiled before its first step: ahead of time, while it reads its data."""

import concurrent.futures
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fetal_flax.config import TrainConfig
from fetal_flax.data.photometric import UNCHANGED, Photometric
from fetal_flax.data.pipeline import Batch
from fetal_flax.data.resident import Plan, Resident
from fetal_flax.models import functional
from fetal_flax.training.step import Steps, initial_state


class AheadOfTime:
    """A step that a thread compiles; the first call waits for it.

    Args:
        compile_step: Does it.
    """

    def __init__(self, compile_step: Callable[[], jax.stages.Compiled]):
        self.seconds = 0.0
        """What it took."""
        pool = concurrent.futures.ThreadPoolExecutor(1)
        self._compiled = pool.submit(self._timed, compile_step)
        pool.shutdown(wait=False)

    @property
    def compiled(self) -> jax.stages.Compiled:
        """The compiled step."""
        return self._compiled.result()

    def __call__(self, *arguments: Any) -> Any:
        """Calls the step."""
        return self.compiled(*arguments)

    def _timed(self, compile_step: Callable[[], jax.stages.Compiled]) -> jax.stages.Compiled:
        start = time.perf_counter()
        compiled = compile_step()
        self.seconds = time.perf_counter() - start
        return compiled


def compile_train_step(
    config: TrainConfig, steps: Steps, *, records: int, steps_per_dispatch: int
) -> AheadOfTime:
    """Begins to compile `steps.train_several` or, for `data.backend` device, `train_resident`.

    Args:
        config: The run.
        steps: Its steps.
        records: Images of the data set; of no matter to `train_several`.
        steps_per_dispatch: Steps that a call does.
    """
    variables = functional.shapes(config.model)
    state = jax.eval_shape(functools.partial(initial_state, config), variables)
    pos_weight = _shape((), np.float32)
    rows, size = (steps_per_dispatch, config.schedule.batch_size), config.data.image_size
    photometric = None
    if config.augmentation.photometric:
        photometric = Photometric(*(_shape(rows, part.dtype) for part in UNCHANGED))
    if config.data.backend == "host":
        batches = Batch(
            image=_shape((*rows, *size, config.model.in_channels), np.uint8),
            mask=_shape((*rows, *size, 1), np.uint8),
            valid=_shape(rows, np.bool_),
            record=_shape(rows, np.int32),
            photometric=photometric,
        )
        step, arguments = steps.train_several, (state, pos_weight, batches)
    else:
        images = _shape((records, *size), np.uint8)
        plan = Plan(
            record=_shape(rows, np.int32),
            matrix=_shape((*rows, 2, 3), np.float32),
            photometric=photometric,
        )
        step = steps.train_resident
        arguments = state, pos_weight, Resident(images, images), plan
    return AheadOfTime(lambda: step.lower(*arguments).compile())


def _shape(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
