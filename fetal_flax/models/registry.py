"""The networks by their names in `ModelConfig`.

Each takes images in [0, 1], (batch, height, width, channels), and returns raw logits in float32,
(batch, height, width, 1). How a call trains is its arguments' or, where these are None, what
`model.train()` and `model.eval()` have set last; a new network begins in evaluation. `train`
normalises with batch statistics, updates the running ones and drops out; `train_encoder` does the
same for the encoder's batch norms, which is what a trainable encoder wants and a frozen one does
not. No parameter is frozen here: that is the optimizer's business (training/optimizer.py).
"""

import dataclasses
from typing import Any

from flax import nnx

from fetal_flax.config import ModelConfig
from fetal_flax.models.mobilenet_aspp_se_unet import MobileNetASPPSEUNet
from fetal_flax.models.mobilenet_unet import MobileNetUNet
from fetal_flax.models.unet import UNet

Network = MobileNetASPPSEUNet | MobileNetUNet | UNet

NETWORKS: dict[str, type[Network]] = {
    "mobilenet_aspp_se_unet": MobileNetASPPSEUNet,
    "mobilenet_unet": MobileNetUNet,
    "unet": UNet,
}


def create_model(
    model: ModelConfig | str = ModelConfig.name, *, rngs: nnx.Rngs, **settings: Any
) -> Network:
    """Returns a network, freshly initialised.

    Args:
        model: Which network: its name, or its settings.
        rngs: Source of the `params` stream. The numbers depend on its key alone, but differ between
            a network that is made as it is and one that is made under a trace (models/init.py).
        settings: Fields of `ModelConfig` that are set otherwise, such as `variant="compact"` or
            `in_channels=3`.

    Raises:
        InputError: There is no such network, or a setting doesn't fit.
        TypeError: There is no such setting.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> model = create_model("unet", base_width=4, rngs=nnx.Rngs(0))
        >>> nnx.jit(model)(jnp.zeros((1, 32, 48, 1))).shape
        (1, 32, 48, 1)

        What the proposed network holds, without drawing any of it:

        >>> abstract = nnx.eval_shape(lambda: create_model(rngs=nnx.Rngs(0)))
        >>> abstract.stage5.up.kernel.shape
        (512, 2, 2, 256)
    """
    if isinstance(model, str):
        values: dict[str, Any] = {"name": model, **settings}
        config = ModelConfig(**values)
    else:
        config = dataclasses.replace(model, **settings)
    return NETWORKS[config.name](config, rngs=rngs)
