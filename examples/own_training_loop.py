"""A training loop of one's own: `apply_train` is a pure function, the rest is JAX and optax."""

import argparse
import functools
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fetal_flax as ff

CONFIG = ff.ModelConfig(name="unet", base_width=8)
OPTIMIZER = ff.optimizers.adam_l2(1e-3)


def batch(indices: range, side: int) -> tuple[jax.Array, jax.Array]:
    phantoms = [ff.make_phantom(0, index, height=128, width=192) for index in indices]
    images = np.stack([cv2.resize(phantom.image, (side, side)) for phantom in phantoms])
    masks = np.stack([cv2.resize(phantom.mask, (side, side)) for phantom in phantoms])
    return jnp.float32(images[..., None]) / 255, jnp.float32(masks[..., None] > 127)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(variables: ff.Variables, moments, images, masks, key):
    def loss(params):
        logits, batch_stats = ff.apply_train(
            CONFIG, variables._replace(params=params), images, dropout_key=key
        )
        return ff.losses.dice_bce(logits, masks), batch_stats

    (value, batch_stats), gradients = jax.value_and_grad(loss, has_aux=True)(variables.params)
    updates, moments = OPTIMIZER.update(gradients, moments, variables.params)
    params: Any = optax.apply_updates(variables.params, updates)
    return ff.Variables(params, batch_stats), moments, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--side", type=int, default=96, help="of the network's images, in pixels")
    parser.add_argument("--output", default="runs/own", help="a new folder for the network")
    options = parser.parse_args()
    variables = ff.init(CONFIG, seed=0)
    moments = jax.jit(OPTIMIZER.init)(variables.params)
    for step in range(options.steps):
        images, masks = batch(range(8 * step, 8 * step + 8), options.side)
        key = jax.random.fold_in(jax.random.key(0), step)
        variables, moments, loss = train_step(variables, moments, images, masks, key)
        print(f"step {step}: loss {loss:.4f}")
    # How masks were drawn is a property of the data set, and measuring a head minds it.
    run = {"seed": 0, "data": {"dataset": "fetal_phantom"}}
    description = ff.Description("network", CONFIG, (options.side, options.side), config=run)
    ff.save_checkpoint(options.output, ff.Checkpoint(variables, description))


if __name__ == "__main__":
    main()
