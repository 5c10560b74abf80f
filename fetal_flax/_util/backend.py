"""Which backend programs are made for: the one that is there, or another."""

import jax

programs_for = jax.make_user_context(None)
"""`with programs_for("gpu"):` traces programs as for that backend, whichever is there."""


def target_backend() -> str:
    """Returns the backend that programs are made for, as `jax.default_backend` names it.

    What is chosen by it at tracing, such as the form of a convolution, is chosen anew under
    `programs_for`: JAX's caches of traced functions know that context.
    """
    return programs_for.value or jax.default_backend()
