import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fetal_flax.data.splits import Split, read_manifest, split, write_manifest
from fetal_flax.errors import InputError


def _records(sizes: list[int]) -> tuple[list[str], list[str]]:
    """Names and examinations: as many images per examination as `sizes` says."""
    pairs = [(f"{e:03d}_{k}HC", f"{e:03d}") for e, size in enumerate(sizes) for k in range(size)]
    names, examinations = zip(*pairs, strict=True)
    return list(names), list(examinations)


SIZES = st.lists(st.integers(1, 4), min_size=6, max_size=60)


@settings(max_examples=50, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**31), folds=st.sampled_from([0, 2, 5]))
def test_sides_share_no_examination_and_lose_no_image(sizes: list[int], seed: int, folds: int):
    names, examinations = _records(sizes)
    validated = Counter()
    for fold in range(max(folds, 1)):
        sides = split(names, examinations, seed=seed, folds=folds, fold=fold)
        assert sides.train
        assert sides.validation
        assert sorted(sides.train + sides.validation) == list(range(len(names)))
        assert not {examinations[i] for i in sides.train} & {
            examinations[i] for i in sides.validation
        }
        validated.update(sides.validation)
    if folds:
        assert validated == Counter(range(len(names)))  # Every image validates in one fold.


def test_folds_are_balanced_by_images():
    names, examinations = _records([4, 4, 4, 4, 4] + [1] * 30)
    sizes = [len(split(names, examinations, seed=3, folds=5, fold=k).validation) for k in range(5)]
    assert sizes == [10] * 5


def test_fraction_counts_examinations():
    names, examinations = _records([1, 2] * 50)
    sides = split(names, examinations, seed=0, validation_fraction=0.3)
    assert len({examinations[i] for i in sides.validation}) == 30


# By SHA-256 of "7:000", "7:001", ...
EXPECTED = (1, 2)


def test_same_on_every_machine():
    names, examinations = _records([1] * 12)
    assert split(names, examinations, seed=7).validation == EXPECTED
    assert split(names, examinations, seed=8).validation != EXPECTED
    # Whichever order the records come in.
    backwards = split(names[::-1], examinations[::-1], seed=7).validation
    assert sorted(11 - i for i in backwards) == list(EXPECTED)


@pytest.mark.parametrize(("count", "folds"), [(1, 0), (4, 5)])
def test_too_few_examinations(count: int, folds: int):
    names, examinations = _records([3] * count)
    with pytest.raises(InputError, match=rf"^{count} examination.*too few"):
        split(names, examinations, seed=0, folds=folds)


def test_manifest_round_trip(tmp_path: Path):
    names, examinations = _records([1, 2, 3, 1])
    sides = split(names, examinations, seed=0)
    path = tmp_path / "split.json"
    write_manifest(path, sides, names, method={"seed": 0, "folds": 0})
    assert [p.name for p in tmp_path.iterdir()] == ["split.json"]
    written = json.loads(path.read_text())
    assert written["method"] == {"seed": 0, "folds": 0}
    assert written["validation"] == [names[i] for i in sides.validation]
    assert read_manifest(path, names) == sides
    assert read_manifest(path, names[::-1]) == Split(
        *(tuple(sorted(6 - i for i in side)) for side in (sides.train, sides.validation))
    )


@pytest.mark.parametrize(
    "content",
    [
        *(None, "{", "[]", '{"train": []}', '{"a":' + "[" * 100_000),
        *('{"train": [[]], "validation": []}', '{"train": ["a"], "validation": [1]}'),
    ],
)
def test_bad_manifest_is_named(tmp_path: Path, content: str | None):
    path = tmp_path / "split.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"split\.json can't be read"):
        read_manifest(path, ["a"])


def test_manifest_of_another_dataset(tmp_path: Path):
    names, examinations = _records([1, 1, 1])
    path = tmp_path / "split.json"
    write_manifest(path, split(names, examinations, seed=0), names, method={})
    with pytest.raises(InputError, match=r"names 1 image.*that the dataset lacks: 002_0HC"):
        read_manifest(path, names[:2])
