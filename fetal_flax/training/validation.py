"""Validation loss and Dice; keeps batches and a frozen encoder's features on the devices."""

import collections
import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from fetal_flax.data.batch import Batch
from fetal_flax.data.device_loader import evaluation_recipes
from fetal_flax.data.host_loader import DeviceBatches, evaluation_batches, prefetch_to_device
from fetal_flax.errors import Interrupted
from fetal_flax.measurement.ellipse_overlap import ellipse_dice
from fetal_flax.models.functional import Variables
from fetal_flax.models.interface import EncoderFeatures
from fetal_flax.training.distributed import shard
from fetal_flax.training.interruption import Interruption
from fetal_flax.training.setup import Setup
from fetal_flax.training.sharding import batch_sharding, step_sharding
from fetal_flax.training.step import encoder_is_static


class Validation:
    """Measures networks on a run's validation split.

    Its images are the same every time, and so is what a frozen encoder makes of them. Both stay on
    the devices from the first time on, as far as `data.keep_validation_mb` allows; the numbers are
    the same to the bit, whether kept or not.

    Args:
        setup: The run.
    """

    def __init__(self, setup: Setup):
        self._setup = setup
        config = setup.config
        self._encodes = config.model.name != "unet" and encoder_is_static(config)
        self._kept: list[tuple[Batch, EncoderFeatures | None]] = []

    def measure(
        self, variables: Variables, interruption: Interruption | None = None
    ) -> dict[str, float]:
        """Returns mean loss and Dice, every image counted once.

        With `schedule.select_by` ellipse_dice also the Dice of the ellipses that are fitted to the
        masks' largest regions, at the network's size.

        Args:
            variables: The network; a frozen encoder has the same ones every time.
            interruption: Ends it early.

        Raises:
            Interrupted: `interruption` was requested.
        """
        losses: list[float] = []
        dices: list[float] = []
        ellipse_dices: list[float] = []
        pending: collections.deque[dict[str, jax.Array]] = collections.deque()

        def read() -> None:
            metrics = jax.device_get(pending.popleft())
            valid = metrics["valid"]
            losses.extend([float(metrics["loss"])] * int(valid.sum()))
            dices.extend(metrics["dice"][valid].tolist())
            if "predicted" in metrics:
                ellipse_dices.extend(
                    map(ellipse_dice, metrics["predicted"][valid], metrics["annotated"][valid])
                )

        evaluate, pos_weight = (
            self._setup.programs.validation_step,
            self._setup.pos_weight_on_devices,
        )
        for batch, maps in self._inputs(variables):
            pending.append(evaluate(variables, pos_weight, batch, maps))
            if len(pending) > 1:
                read()
            if interruption and interruption.requested():
                raise Interrupted
        while pending:
            read()
        numbers = {"loss": losses, "dice": dices, "ellipse_dice": ellipse_dices}
        return {f"validation_{name}": float(np.mean(v)) for name, v in numbers.items() if v}

    def _inputs(self, variables: Variables) -> Iterator[tuple[Batch, EncoderFeatures | None]]:
        """Yields the batches with their features; keeps them once it has yielded all."""
        if self._kept:
            for batch, features in self._kept:
                yield batch, self._encode(variables, batch) if features is None else features
            return
        kept = []
        with contextlib.closing(self._open()) as batches:
            for batch in batches:
                features = self._encode(variables, batch)
                if self._fits(batch):
                    kept.append((batch, features if self._fits((batch, features)) else None))
                yield batch, features
        self._kept = kept

    def _encode(self, variables: Variables, batch: Batch) -> EncoderFeatures | None:
        return self._setup.programs.encode_step(variables, batch) if self._encodes else None

    def _fits(self, of_a_batch: Any) -> bool:
        """Returns whether the arrays of all batches are few enough to be kept."""
        config = self._setup.config
        batches = -(-len(self._setup.split.validation) // config.schedule.batch_size)
        size = sum(array.nbytes for array in jax.tree.leaves(of_a_batch))
        return batches * size / self._setup.mesh.size <= config.data.keep_validation_mb * 1e6

    def _open(self) -> DeviceBatches[Batch]:
        setup, config = self._setup, self._setup.config
        batch_size = config.schedule.batch_size
        if setup.device_dataset is None:
            batches = evaluation_batches(
                setup.dataset,
                setup.split.validation,
                config.data,
                channels=config.model.in_channels,
                batch_size=batch_size,
                shard=shard(),
            )
            return prefetch_to_device(batches, batch_sharding(setup.mesh))
        recipes = evaluation_recipes(setup.split.validation, batch_size, shard())
        gather = functools.partial(setup.programs.gather_batch, setup.device_dataset)
        return prefetch_to_device(recipes, step_sharding(setup.mesh), prepare=gather)
