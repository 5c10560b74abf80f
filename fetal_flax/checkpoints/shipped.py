"""Trained networks in plain files: what the package ships, and any folder like it.

    NAME/network.safetensors    parameters and batch statistics by name, float16 or float32
    NAME/description.json       network, image size, config, figures, SHA-256
    NAME/MODEL_CARD.md          for people
    NAME/split.json             names of the images that it was trained and validated with, if any
                                were left out

The package's own are in fetal_flax/networks, and are known by their names. What is loaded are
float32 arrays with exactly the values that are stored. Files are taken to be a stranger's: nothing
is unpickled, and sizes, names, dtypes, shapes, values and digests are checked.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from fetal_flax._util.files import json_bytes
from fetal_flax.checkpoints.description import (
    Checkpoint,
    DamagedError,
    Description,
    from_json,
    to_json,
)
from fetal_flax.checkpoints.integrity import checked, digest_of_arrays, digest_of_json
from fetal_flax.config import DataConfig, TrainConfig, from_dict
from fetal_flax.errors import InputError, printable
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables

DEFAULT_NETWORK = "hc18-described"
"""What `predict` takes where no checkpoint is given."""
FOLDER = Path(__file__).parents[1] / "networks"

ARRAYS, DESCRIPTION, CARD, SPLIT = (
    "network.safetensors",
    "description.json",
    "MODEL_CARD.md",
    "split.json",
)
TRAINED_ON = "trained_on"
"""Entry of the description's progress: `ALL_IMAGES`, or `a split`, which is beside it then."""
ALL_IMAGES = "all images"
A_SPLIT = "a split"
LICENCES = {"hc18": "CC BY 4.0", "fetal_phantom": "Apache-2.0"}
"""Of a network's weights, by the data set that they were computed from; its card says more."""

_LARGEST_DESCRIPTION = 2**22
_LARGEST_HEADER = 2**20
# What damaged or odd files raise in the readers below.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
    safetensors.SafetensorError,
)


class ShippedNetwork(NamedTuple):
    """A network that the package ships, in a few words; its MODEL_CARD.md has the others."""

    name: str
    """What `load` and every command take."""
    title: str
    """Which network it is."""
    parameters: int
    dice: float | None
    """Mean over held-out images, in [0, 1]; None where nothing was measured."""
    adf_mm: float | None
    """Mean absolute difference of the head circumference (ADF) on them, in mm."""
    licence: str


def list_networks() -> tuple[ShippedNetwork, ...]:
    """Returns the trained networks that the package ships, by name; there may be none.

    Raises:
        InputError: One of them is damaged.

    Example:
        >>> for network in ff.list_networks():
        ...     print(network.name, network.title, network.parameters, network.licence)
        hc18-described unet 30715 CC BY 4.0
    """
    return tuple(_summary(name) for name in names())


def _summary(name: str) -> ShippedNetwork:
    with _damage_named(FOLDER / name):
        description, values = _read_description(FOLDER / name)
        evaluations = values["figures"].get("evaluations")
        dice, adf = (
            evaluations[0][metric]["mean"] if evaluations else None
            for metric in ("dice", "hc_abs_error_mm")
        )
        shapes = functional.shapes(description.model).params.values()
    return ShippedNetwork(
        name,
        title=description.model.title,
        parameters=sum(math.prod(array.shape) for array in shapes),
        dice=dice,
        adf_mm=adf,
        licence=LICENCES[description.dataset],
    )


def names() -> tuple[str, ...]:
    """Returns the names of the networks that the package ships, in order."""
    paths = FOLDER.iterdir() if FOLDER.is_dir() else ()
    return tuple(sorted(path.name for path in paths if exists(path)))


def exists(folder: Path) -> bool:
    """Returns whether a folder holds a network in these files."""
    return (folder / DESCRIPTION).is_file()


def default() -> Path:
    """Returns the folder of `DEFAULT_NETWORK`.

    Raises:
        InputError: The package doesn't ship it.
    """
    if DEFAULT_NETWORK not in names():
        raise InputError(
            f"the network {DEFAULT_NETWORK} is not in this package: give {choices()} as "
            "--checkpoint"
        )
    return FOLDER / DEFAULT_NETWORK


def choices() -> str:
    """Returns what a checkpoint can be, as part of a sentence."""
    known = f" ({', '.join(names())})" if names() else ", of which this package has none"
    return f"a training workdir, a converted directory or the name of a shipped network{known}"


def load(folder: Path) -> Checkpoint:
    """Loads a network.

    Args:
        folder: Holds the files.

    Returns:
        Its variables as float32 arrays, and what it says of itself.

    Raises:
        DamagedError: A file is missing, can't be read, or holds something else than was saved.
        InputError: It is of another format, or has settings that this version doesn't know.
    """
    with _damage_named(folder):
        description, values = _read_description(folder)
        digests = values["sha256"]
        expected = functional.shapes(description.model)
        elements = sum(math.prod(shape.shape) for shape in jax.tree.leaves(expected))
        content = _read(folder / ARRAYS, 4 * elements + _LARGEST_HEADER)
        if digests[ARRAYS] != hashlib.sha256(content).hexdigest():
            raise ValueError(f"{ARRAYS} is not what was saved")
        arrays = safetensors.numpy.load(content)
        _check_arrays(arrays, expected)
        variables = to_float32(arrays, expected)
        if digests["variables"] != digest_of_arrays(variables._asdict()):
            raise ValueError("its arrays are not what was saved")
    return Checkpoint(variables, description)


@contextlib.contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    """Turns what is raised of broken files into a sentence that names their folder."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{folder} can't be loaded: {error}") from None
    except _DAMAGE as error:
        missing = "no entry " * isinstance(error, KeyError)
        reason = missing + printable((str(error).splitlines() or [type(error).__name__])[0])
        raise DamagedError(
            f"{folder} is damaged ({reason}): install the package again, or restore the folder "
            "from a copy"
        ) from error


def contents(
    arrays: Mapping[str, np.ndarray], description: Description, figures: Mapping[str, Any]
) -> dict[str, bytes]:
    """Returns the files of a network by name, without a card and a split.

    Args:
        arrays: What `to_float16` returned.
        description: Of a whole network.
        figures: What was measured with it, as JSON values.
    """
    stored = safetensors.numpy.save(dict(arrays))
    values = to_json(description) | {"figures": dict(figures)}
    digests = {
        ARRAYS: hashlib.sha256(stored).hexdigest(),
        "variables": digest_of_arrays(
            to_float32(arrays, functional.shapes(description.model))._asdict()
        ),
        "description": digest_of_json(values),
    }
    return {ARRAYS: stored, DESCRIPTION: json_bytes(values | {"sha256": digests})}


def save(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a network's files into a new folder, all of them or none.

    Raises:
        InputError: The folder exists, or can't be written.
    """
    if folder.exists():
        raise InputError(f"{folder} exists: remove it, or choose another --output")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            for name, content in files.items():
                (unfinished / name).write_bytes(content)
            unfinished.chmod(0o755)  # mkdtemp's folders are their owner's alone.
            os.rename(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"can't write {folder} ({error.strerror}): choose an --output that can be written"
        ) from error


def to_float16(variables: Variables, *, encoder: bool = True) -> dict[str, np.ndarray]:
    """Returns the arrays to store by name, parameters and batch statistics together.

    Kernels become the nearest float16 values. Vectors (biases, scales, statistics) stay float32:
    they are 1 % of the bytes, and a rounded one shifts a whole map.

    Args:
        variables: Parameters and batch statistics.
        encoder: Whether the encoder's kernels too, or as float32, as they are.

    Raises:
        InputError: An array has values that are not finite, or beyond float16.
    """
    arrays = {}
    for name, array in (variables.params | variables.batch_stats).items():
        arrays[name] = whole = np.asarray(array)
        if whole.ndim > 1 and (encoder or not name.startswith(functional.ENCODER)):
            with np.errstate(over="ignore"):
                arrays[name] = whole.astype(np.float16)
        if not np.isfinite(arrays[name]).all():
            raise InputError(
                f"float16 can't hold {name}, whose largest value is {np.abs(whole).max():g}: such "
                "a network can't be shipped, so train it again with a larger optimizer.l2"
            )
    return arrays


def to_float32(arrays: Mapping[str, np.ndarray], expected: Variables) -> Variables:
    """Returns arrays as float32, which holds all values of float16.

    Args:
        arrays: By name.
        expected: Variables or shapes that tell the parameters from the batch statistics.
    """
    # jnp.asarray would compile a program for each shape.
    return Variables(
        *({n: jax.device_put(arrays[n].astype(np.float32)) for n in part} for part in expected)
    )


def _read(path: Path, limit: int) -> bytes:
    if not path.is_file():  # A pipe would wait for ever.
        raise ValueError(f"it has no file {path.name}")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path.name} is larger than such a network's can be")
    return content


def _read_description(folder: Path) -> tuple[Description, dict[str, Any]]:
    """Reads a network's description; the JSON values hold its figures and digests too."""
    content = _read(folder / DESCRIPTION, _LARGEST_DESCRIPTION)
    values, digests = checked(json.loads(content))
    if not digests:
        raise ValueError(f"{DESCRIPTION} has no digests")
    return _usable(from_json(values, DESCRIPTION)), values | {"sha256": digests}


def _usable(description: Description) -> Description:
    """Refuses what a run wouldn't have written, and others would stumble over."""
    if description.kind != "network":
        raise ValueError("it holds no whole network")
    from_dict(DataConfig, {"image_size": description.image_size}, path="image_size")
    if description.config is not None:
        config = dict(description.config)
        config.pop("pos_weight", None)  # What `auto` came to.
        from_dict(TrainConfig, config)
        if "seed" not in config or "dataset" not in config["data"]:
            raise ValueError("its config names no seed or no data set")
    for epoch in description.progress.get("history", ()):
        if type(epoch["epoch"]) is not int:
            raise ValueError("its history names no epoch")
    return description


def _check_arrays(arrays: Mapping[str, np.ndarray], expected: Variables) -> None:
    shapes = expected.params | expected.batch_stats
    if differing := sorted(arrays.keys() ^ shapes.keys()):
        what = "lacks" if differing[0] in shapes else "has a surplus"
        raise ValueError(f"{ARRAYS} {what} {differing[0]}")
    for name, array in arrays.items():
        if array.dtype not in (np.float16, np.float32):
            raise ValueError(f"{name} is {array.dtype}, neither float16 nor float32")
        if array.shape != shapes[name].shape:
            raise ValueError(f"{name} has shape {array.shape}, not {shapes[name].shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds values that are not finite")
