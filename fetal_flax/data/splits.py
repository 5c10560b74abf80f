"""Group-wise split: all images of an examination, near copies of each other, go to one side."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fetal_flax._util.files import json_bytes, write_atomically
from fetal_flax.errors import InputError, printable


@dataclasses.dataclass(frozen=True)
class Split:
    """Record indices of either side, ascending."""

    train: tuple[int, ...]
    validation: tuple[int, ...]


def split(
    names: Sequence[str],
    examinations: Sequence[str],
    *,
    seed: int,
    validation_fraction: float = 0.2,
    folds: int = 0,
    fold: int = 0,
) -> Split:
    """Splits records by examination, the same on every machine.

    Examinations are put in the order of the SHA-256 of seed and identifier. Without folds the
    first of them validate, up to the fraction; with folds each examination in turn goes to the
    fold with the fewest images, which keeps the folds equal to within an examination.

    Args:
        names: Name of each record; each may occur once.
        examinations: Examination of each record, in the order of `names`.
        seed: Another seed gives another split.
        validation_fraction: Share of the examinations that validate when `folds` is 0.
        folds: Number of cross-validation folds, or 0.
        fold: Which of them validates.

    Raises:
        InputError: There are too few examinations for both sides, or for the folds.
    """
    assert len(names) == len(examinations) == len(set(names)), "one examination for each name"
    order = sorted(set(examinations), key=lambda examination: _draw(seed, examination))
    if len(order) < max(2, folds):
        raise InputError(
            f"{len(order)} examination(s) are too few to split: expected {max(2, folds)} or more"
        )
    if folds:
        validating = _balanced_folds(order, Counter(examinations), folds)[fold]
    else:
        count = min(max(round(validation_fraction * len(order)), 1), len(order) - 1)
        validating = set(order[:count])
    sides = Split(
        train=tuple(i for i, e in enumerate(examinations) if e not in validating),
        validation=tuple(i for i, e in enumerate(examinations) if e in validating),
    )
    shared = {examinations[i] for i in sides.train} & {examinations[i] for i in sides.validation}
    assert not shared, f"examinations on both sides of the split: {sorted(shared)}"
    return sides


def write_manifest(
    path: Path, sides: Split, names: Sequence[str], *, method: dict[str, Any]
) -> None:
    """Writes a split as JSON, whole or not at all.

    Args:
        path: The file; its folder is created if needed.
        sides: The split.
        names: Name of each record.
        method: How the split was made: the arguments of `split`.
    """
    manifest = {
        "method": method,
        "train": [names[i] for i in sides.train],
        "validation": [names[i] for i in sides.validation],
    }
    write_atomically(path, json_bytes(manifest))


def read_manifest(path: Path, names: Sequence[str]) -> Split:
    """Reads `write_manifest`'s file back as indices into `names`.

    Raises:
        InputError: The file is missing or no manifest, or names records that aren't in `names`.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        sides = {side: list(manifest[side]) for side in ("train", "validation")}
        if not all(isinstance(name, str) for names in sides.values() for name in names):
            raise TypeError("names must be text")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path} can't be read as a split: {error}") from None
    index = {name: i for i, name in enumerate(names)}
    unknown = sorted(set(sides["train"] + sides["validation"]) - set(index))
    if unknown:
        named = ", ".join(map(printable, unknown[:5]))
        raise InputError(f"{path} names {len(unknown)} image(s) that the dataset lacks: {named}")
    train, validation = (tuple(sorted(index[name] for name in side)) for side in sides.values())
    return Split(train, validation)


def _draw(seed: int, examination: str) -> str:
    return hashlib.sha256(f"{seed}:{examination}".encode()).hexdigest()


def _balanced_folds(order: list[str], images: Counter[str], folds: int) -> list[set[str]]:
    """Deals the examinations out, each to the fold that has the fewest images so far."""
    dealt: list[set[str]] = [set() for _ in range(folds)]
    sizes = [0] * folds
    # The examinations with the most images first, as long as they can still be evened out.
    for examination in sorted(order, key=lambda examination: -images[examination]):
        smallest = sizes.index(min(sizes))
        dealt[smallest].add(examination)
        sizes[smallest] += images[examination]
    return dealt
