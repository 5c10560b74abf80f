"""HC18's official training set from Zenodo, downloaded and unpacked once."""

import os
import zipfile
from pathlib import Path

from fetal_flax._util.download import fetch
from fetal_flax.data.hc18.folder import IMAGES
from fetal_flax.data.hc18.measurements import CSV
from fetal_flax.errors import InputError

_URL = "https://zenodo.org/api/records/1327317/files/{}/content"
_FILES = {
    CSV: (33688, "1c08fa81c374c5f9509f3aa6a6568e4dc6cc5434ff82d0df731db7e4f25816b3"),
    f"{IMAGES}.zip": (
        132926838,
        "fd20d7909df892cfbdc0850de18072dbdad4dc3bc0a57202d4cc818d4715de36",
    ),
}
"""Sizes in bytes, and SHA-256."""


def download(cache_dir: Path) -> Path:
    """Downloads the official training set once and returns its folder.

    Raises:
        InputError: A file can't be fetched; the message says how to do without.
    """
    folder = cache_dir / "downloads" / "hc18"
    try:
        for name, (size, sha256) in _FILES.items():
            fetch(_URL.format(name), folder / name, sha256=sha256, size=size)
    except InputError as error:
        raise InputError(
            f"{error}; or unpack HC18 (https://zenodo.org/records/1327317) anywhere and name that "
            "folder (train: --data.data-dir, evaluate: --data-dir, data prepare: --source)"
        ) from None
    if not (folder / IMAGES).is_dir():
        _unpack(folder / f"{IMAGES}.zip", folder)
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    """Unpacks the archive's `training_set/` into `folder`, whole or not at all."""
    unfinished = folder / f"unpacking-{os.getpid()}"
    with zipfile.ZipFile(archive) as zipped:
        zipped.extractall(unfinished)
    (unfinished / IMAGES).rename(folder / IMAGES)
    unfinished.rmdir()
