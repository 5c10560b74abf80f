"""What the public interface (`fetal_flax/__init__.py`) has of its own: settings as keywords."""

from typing import Any

from flax import nnx

from fetal_flax.config import ModelConfig
from fetal_flax.models.unet import Network, create_network


def create_model(name: str = ModelConfig.name, *, rngs: nnx.Rngs, **settings: Any) -> Network:
    """Returns a network, freshly initialised: an `nnx.Module`.

    Called with images in [0, 1], (batch, height, width, channels), it returns logits, (batch,
    height, width, 1).

    Args:
        name: `mobilenet_aspp_se_unet`, `mobilenet_unet` or `unet`.
        rngs: Source of the `params` stream.
        settings: Further fields of `ModelConfig`, such as `variant="published"` or
            `in_channels=3`.

    Raises:
        InputError: There is no such network, or a setting doesn't fit.
        TypeError: There is no such setting.

    Example:
        >>> model = ff.create_model("unet", base_width=4, rngs=nnx.Rngs(0))
        >>> nnx.jit(model)(jnp.zeros((1, 32, 64, 1))).shape
        (1, 32, 64, 1)
    """
    values: dict[str, Any] = {"name": name, **settings}
    return create_network(ModelConfig(**values), rngs=rngs)
