"""What a checkpoint says of itself, however it is stored."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from fetal_flax.config import ModelConfig, from_dict, to_dict
from fetal_flax.errors import InputError
from fetal_flax.models.functional import Variables

FORMAT = 2
Kind = Literal["network", "encoder"]


class DamagedError(InputError):
    """A checkpoint's files can't be read, or hold something else than was saved."""


@dataclasses.dataclass(frozen=True)
class Description:
    """What a checkpoint holds, readable without loading it.

    Example:
        >>> description = ff.Description("network", ff.ModelConfig(name="unet"), (128, 192))
        >>> description.title, description.dataset
        ('a unet', 'hc18')
    """

    kind: Kind
    """A whole network, or a MobileNetV2 encoder alone."""
    model: ModelConfig
    """The network; of an encoder, one that it fits."""
    image_size: tuple[int, int] = (256, 256)
    """Height and width that the network was trained at."""
    config: Mapping[str, Any] | None = None
    """The training run's config, where there was one."""
    progress: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """Epoch, history and schedule state of the run, or the source of a conversion."""

    @property
    def dataset(self) -> str:
        """The data set whose way of drawing masks the network has learned; HC18 if unknown."""
        return "hc18" if self.config is None else self.config["data"]["dataset"]

    @property
    def title(self) -> str:
        """What the checkpoint holds, in a few words."""
        return "a MobileNetV2 encoder" if self.kind == "encoder" else f"a {self.model.title}"


class Checkpoint(NamedTuple):
    """A network's arrays, and what they are: what is loaded, saved and converted.

    Example:
        >>> config = ff.ModelConfig(name="unet", base_width=4)
        >>> checkpoint = ff.Checkpoint(
        ...     ff.init(config, seed=0), ff.Description("network", config, (64, 96))
        ... )
        >>> checkpoint.config.name, checkpoint.image_size
        ('unet', (64, 96))
        >>> checkpoint.variables.params["head/kernel"].shape
        (1, 1, 4, 1)
    """

    variables: Variables
    """Parameters and batch statistics, float32 arrays by name."""
    metadata: Description
    """Which network, its image size, and the run or file that it comes from."""

    @property
    def config(self) -> ModelConfig:
        """The network's settings, for `apply` and `create_model`."""
        return self.metadata.model

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the network was trained with, in pixels."""
        return self.metadata.image_size


def to_json(description: Description) -> dict[str, Any]:
    """Returns a description as JSON values, with its format's number."""
    # As it will be read: tuples are lists then.
    return json.loads(json.dumps({"format": FORMAT, **to_dict(description)}))


def from_json(values: Mapping[str, Any], source: str) -> Description:
    """Returns the description that `to_json` made these values of; further ones are left alone.

    Args:
        values: From a file.
        source: How errors name the checkpoint.

    Raises:
        InputError: They are of another format, or the network has settings that there are not.
    """
    found = values.get("format")
    if found != FORMAT:
        raise InputError(
            f"{source} has checkpoint format {found}, this version reads {FORMAT}: "
            "use the version of fetal_flax that wrote it"
        )
    return Description(
        kind=values["kind"],
        model=from_dict(ModelConfig, values["model"], path="model"),
        image_size=tuple(values["image_size"]),
        config=values["config"],
        progress=values["progress"],
    )
