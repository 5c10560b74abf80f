"""The transfer by name, with torchvision's encoder."""

import numpy as np
import pytest

from fetal_flax.config import ModelConfig
from fetal_flax.conversion.names import ENCODER, IGNORED, TABLES
from fetal_flax.conversion.transfer import from_state_dict
from fetal_flax.errors import InputError
from fetal_flax.models import functional
from fetal_flax.models.functional import Variables

EXPECTED = functional.encoder_part(functional.shapes(ModelConfig(in_channels=3)))


def _transfer(tensors: dict[str, np.ndarray]) -> Variables:
    return from_state_dict(tensors, TABLES[ENCODER], EXPECTED, source="FILE", network="NETWORK")


def test_every_tensor_of_torchvision_arrives_once(tensors):
    assert len(tensors) == 314
    variables = _transfer(tensors)
    arrived = variables.params | variables.batch_stats
    kept = {name: a for name, a in tensors.items() if not IGNORED.fullmatch(name)}
    assert len(kept) == len(arrived) == 260
    # No two tensors have the same sum.
    before, after = (
        sorted(np.asarray(a).sum(dtype=float) for a in side.values()) for side in (kept, arrived)
    )
    np.testing.assert_allclose(after, before, rtol=1e-12)


def test_layouts_and_fields_are_ours(tensors):
    variables = _transfer(tensors)
    block, norm = "encoder/blocks/3", "features.3.conv.1.1"
    depthwise = tensors["features.3.conv.1.0.weight"]
    kernel = variables.params[f"{block}/depthwise/conv/kernel"]
    np.testing.assert_array_equal(kernel[:, :, 0], depthwise[:, 0].transpose(1, 2, 0))
    for ours, theirs in {"scale": "weight", "bias": "bias"}.items():
        np.testing.assert_array_equal(
            variables.params[f"{block}/depthwise/norm/{ours}"], tensors[f"{norm}.{theirs}"]
        )
    for field in ("mean", "var"):
        np.testing.assert_array_equal(
            variables.batch_stats[f"{block}/depthwise/norm/{field}"],
            tensors[f"{norm}.running_{field}"],
        )


def test_all_problems_are_listed_at_once(tensors):
    del tensors["features.2.conv.2.weight"]
    tensors["features.19.0.weight"] = np.zeros((4, 4, 1, 1), np.float32)
    tensors["head.scale"] = np.zeros(3, np.float32)
    tensors["features.3.conv.3.bias"] = np.zeros(25, np.float32)
    tensors["features.4.conv.3.bias"][7] = np.nan
    tensors["features.4.conv.3.weight"][7] = np.inf
    integers = tensors["features.5.conv.3.bias"].astype(np.int32)
    tensors["features.5.conv.3.bias"] = integers
    tensors["features.6.conv.3.bias"] = tensors["features.6.conv.3.bias"][None]
    with pytest.raises(InputError) as error:
        _transfer(tensors)
    start, problems, _ = str(error.value).split(": ")
    assert start == "FILE doesn't fit NETWORK"
    assert problems.split("; ") == [
        "missing features.2.conv.2.weight",
        "surplus features.19.0.weight with shape (4, 4, 1, 1)",
        "surplus head.scale with shape (3,)",
        "features.3.conv.3.bias has shape (25,), not (24,)",
        "features.4.conv.3.bias holds values that are not finite in float32",
        "features.4.conv.3.weight holds values that are not finite in float32",
        "features.5.conv.3.bias holds int32, not floats",
        "features.6.conv.3.bias has shape (1, 32), not (32,)",
    ]


def test_a_name_that_only_contains_a_known_one_is_surplus(tensors):
    tensors["ema.features.0.0.weight"] = tensors["features.0.0.weight"]
    with pytest.raises(InputError, match=r"surplus ema\.features\.0\.0\.weight"):
        _transfer(tensors)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_become_float32(tensors, dtype):
    tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    variables = _transfer(tensors)
    assert {a.dtype for arrays in variables for a in arrays.values()} == {np.dtype(np.float32)}
