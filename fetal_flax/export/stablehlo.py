"""Networks as StableHLO, the portable form of a JAX function, which JAX alone loads again.

    jax.export.deserialize(pathlib.Path("network.stablehlo").read_bytes()).call(images)

One file serves CPU, CUDA and TPU; its layers have the forms that no backend prefers.
"""

import jax
import jax.export
import jax.numpy as jnp
from jaxtyping import Array

from fetal_flax._util.backend import programs_for
from fetal_flax.checkpoints import Checkpoint
from fetal_flax.export.settings import ExportSettings
from fetal_flax.models import functional

PLATFORMS = ("cpu", "cuda", "tpu")


def stablehlo(checkpoint: Checkpoint, settings: ExportSettings) -> bytes:
    """Returns a network as a serialized function, weights included.

    From images, (batch, height, width, channels) at the network's size, float32 in [0, 1] or uint8
    of 0 to 255, to logits, (batch, height, width, 1). The batch is free.

    Args:
        checkpoint: The network.
        settings: Of them `input_dtype`.
    """
    with programs_for("portable"):
        folded = functional.fold(checkpoint.config, checkpoint.variables)

        def logits(images: Array) -> Array:
            if settings.input_dtype == "uint8":
                images = images.astype(jnp.float32) / 255
            return functional.infer(checkpoint.config, folded, images)

        (batch,) = jax.export.symbolic_shape("batch")
        shape = (batch, *checkpoint.image_size, checkpoint.config.in_channels)
        images = jax.ShapeDtypeStruct(shape, settings.input_dtype)
        return bytes(jax.export.export(jax.jit(logits), platforms=PLATFORMS)(images).serialize())
