"""Takes one block, ResidualSEBlock, into a classifier of one's own: no other part of this package.

Each block is an `nnx.Module` on maps of shape (batch, height, width, channels).
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fetal_flax.models import ResidualSEBlock


class Classifier(nnx.Module):
    """Tells bright images from dark ones; its two stages are ours."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.first = ResidualSEBlock(1, 8, rngs=rngs)
        self.second = ResidualSEBlock(8, 16, rngs=rngs)
        self.head = nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = self.first(images, train=train)
        x = self.second(nnx.max_pool(x, (2, 2), (2, 2)), train=train)
        return self.head(x.mean((1, 2)))


@nnx.jit
def train_step(model: Classifier, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array):
    def loss(model: Classifier) -> jax.Array:
        logits = model(images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def main() -> None:
    model = Classifier(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    labels = jnp.arange(16) % 2
    images = jax.random.uniform(jax.random.key(0), (16, 16, 16, 1)) + labels[:, None, None, None]
    for step in range(20):
        loss = train_step(model, optimizer, images, labels)
        print(f"step {step}: loss {loss:.4f}")


if __name__ == "__main__":
    main()
