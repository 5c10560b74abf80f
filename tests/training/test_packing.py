import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fetal_flax.config import OptimizerConfig
from fetal_flax.training.optimizer import create_optimizer
from fetal_flax.training.packing import pack, unpack

VECTORS = {"main/packed": {"a/scale": (2,), "a/dense": (1, 3)}, "encoder/packed": {"e/bias": (4,)}}
ARRAYS = {
    "a/scale": jnp.arange(2.0),
    "a/dense": jnp.arange(2.0, 5).reshape(1, 3),
    "a/kernel": jnp.ones((1, 1, 2, 2)),
    "e/bias": jnp.arange(4.0),
}


def test_vectors_stand_for_their_arrays_in_the_order_of_their_names():
    packed, count = pack((ARRAYS, jnp.zeros(())), VECTORS)
    assert packed.keys() == {"a/kernel", "main/packed", "encoder/packed"}
    np.testing.assert_array_equal(packed["main/packed"], np.arange(5.0))
    assert packed["a/kernel"] is ARRAYS["a/kernel"]
    assert count == 0


def test_what_is_packed_by_no_vector_is_the_same_tree():
    assert pack(ARRAYS, {}) == unpack(ARRAYS, {}) == ARRAYS


@pytest.mark.parametrize("groups", [("main", "encoder"), ("main", "frozen")])
def test_an_optimizers_state_is_unpacked_as_it_was(groups):
    """It holds the moments of each group by itself, without an array for the others' parameters."""
    vectors = {name: VECTORS[name] for name in VECTORS if name.split("/")[0] in groups}
    labels = {name: groups[name.startswith("e/")] for name in ARRAYS}
    state = create_optimizer(OptimizerConfig(), labels).init(ARRAYS)
    numbered = jax.tree.unflatten(
        jax.tree.structure(state),
        [a + i for i, a in enumerate(jax.tree.leaves(state))],
    )
    packed = pack(numbered, vectors)
    assert len(jax.tree.leaves(packed)) == len(jax.tree.leaves(numbered)) - 2
    again = unpack(packed, vectors)
    assert jax.tree.structure(again) == jax.tree.structure(numbered)
    jax.tree.map(np.testing.assert_array_equal, again, numbered)
