import jax
import jax.numpy as jnp

from fetal_flax._util.backend import programs_for, target_backend
from fetal_flax.config import ModelConfig
from fetal_flax.models import functional
from fetal_flax.models.convolution import compiler_options, convolution


def test_programs_are_made_for_what_is_there():
    assert target_backend() == jax.default_backend()


def test_a_traced_function_is_traced_anew_for_another_backend():
    @jax.jit
    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolution(x, kernel)

    def is_product() -> bool:
        lowered = convolve.trace(x, kernel).lower(lowering_platforms=("cuda",))
        return "stablehlo.dot_general" in lowered.as_text()

    x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((1, 1, 4, 4))
    for backend in ("cpu", "gpu", "cpu"):
        with programs_for(backend):
            assert is_product() == (backend == "gpu")
            assert bool(compiler_options(deterministic=True)) or backend == "cpu"


def test_a_network_is_folded_for_the_backend_that_is_asked_for():
    config = ModelConfig(name="unet", base_width=4)
    variables = functional.shapes(config)
    arrays = {}
    for backend in ("cpu", "gpu"):
        with programs_for(backend):
            arrays[backend] = jax.eval_shape(lambda v: functional.fold(config, v), variables)
            images = jax.ShapeDtypeStruct((2, 32, 32, 1), jnp.float32)
            logits = jax.eval_shape(
                lambda a, x: functional.infer(config, a, x), arrays[backend], images
            )
            assert logits.shape == (2, 32, 32, 1)
    assert arrays["cpu"].keys() != arrays["gpu"].keys()
