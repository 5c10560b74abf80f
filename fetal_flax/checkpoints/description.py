"""What a checkpoint says of itself, however it is stored."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from fetal_flax.config import ModelConfig, from_dict, to_dict
from fetal_flax.errors import InputError

FORMAT = 2
Kind = Literal["network", "encoder"]


class DamagedError(InputError):
    """A checkpoint's files can't be read, or hold something else than was saved."""


@dataclasses.dataclass(frozen=True)
class Description:
    """What a checkpoint holds, readable without loading it."""

    kind: Kind
    """A whole network, or a MobileNetV2 encoder alone."""
    model: ModelConfig
    """The network; of an encoder, one that it fits."""
    image_size: tuple[int, int] = (256, 256)
    """Height and width that the network was trained at."""
    config: Mapping[str, Any] | None = None
    """The training run's config, where there was one."""
    progress: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Epoch, history and schedule state of the run, or the source of a conversion."""

    @property
    def dataset(self) -> str:
        """The data set whose way of drawing masks the network has learned; HC18 if unknown."""
        return "hc18" if self.config is None else self.config["data"]["dataset"]

    @property
    def title(self) -> str:
        """What the checkpoint holds, in a few words."""
        return "a MobileNetV2 encoder" if self.kind == "encoder" else f"a {self.model.title}"


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
