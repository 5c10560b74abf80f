"""What the tests of single networks share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from fetal_flax.config import ModelConfig
from fetal_flax.models import functional


@pytest.fixture(scope="session")
def logits_shape() -> Callable[..., tuple[int, ...]]:
    """Returns the shape of the logits of images of a shape; nothing is computed."""

    def shape(config: ModelConfig, *images: int) -> tuple[int, ...]:
        logits = jax.eval_shape(
            lambda variables, x: functional.apply(config, variables, x),
            functional.shapes(config),
            jax.ShapeDtypeStruct(images, jnp.float32),
        )
        assert logits.dtype == jnp.float32
        return logits.shape

    return shape


@pytest.fixture
def record_shapes(monkeypatch) -> Callable[..., list]:
    """Returns a list that gets the shapes, without the batch, of what blocks return, in order."""

    def record(*kinds: type) -> list:
        shapes = []

        def patch(kind: type) -> None:
            call = kind.__call__

            def recorded(self, *arguments, **keywords):
                y = call(self, *arguments, **keywords)
                shapes.append(jax.tree.map(lambda a: a.shape[1:], y))
                return y

            monkeypatch.setattr(kind, "__call__", recorded)

        for kind in kinds:
            patch(kind)
        return shapes

    return record
