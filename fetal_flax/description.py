"""What a checkpoint says of itself, however it is stored, and the digests that vouch for it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

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


def checked(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns a description's values and the digests beside them.

    Raises:
        ValueError: They don't agree.
    """
    values = dict(values)
    digests = values.pop("sha256", {})
    # Before the format is judged, lest a flipped digit passes for a newer version.
    if digests and digests["description"] != digest_of_json(values):
        raise ValueError("its description is not what was saved")
    return values, digests


def digest_of_arrays(tree: Any) -> str:
    """Returns the SHA-256 of names, types, shapes and values; the arrays are whole on each host."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        # Read through an object of its own: what JAX has read once it doesn't donate.
        array = np.asarray(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def digest_of_json(values: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
