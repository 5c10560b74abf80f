"""Compiled steps, kept for the next start of the same run.

JAX's own cache spares a start what XLA does, and is asked after a step was traced and lowered,
which takes as long as all its imports. A step that is found here needs neither. It must never be
another one than tracing would give, so its file is named after everything that it is made of.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.errors import JaxRuntimeError
from jax.experimental import serialize_executable

import fetal_flax
from fetal_flax.config import TrainConfig, to_dict
from fetal_flax.errors import InputError
from fetal_flax.files import write_atomically

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def compile_or_load(
    config: TrainConfig, mesh: jax.sharding.Mesh, step: jax.stages.Wrapped, arguments: Any
) -> jax.stages.Compiled:
    """Returns the compiled step, from the folder of JAX's cache if it is there.

    Args:
        config: All that the step was made from, together with the mesh.
        mesh: Its devices.
        step: The step.
        arguments: Their shapes.
    """
    folder = jax.config.values["jax_compilation_cache_dir"]
    if not folder or jax.process_count() > 1:
        return step.lower(*arguments).compile()
    path = Path(folder, "steps", _key(config, mesh, arguments))
    if (kept := _load(path)) is not None:
        return kept
    lowered = step.lower(*arguments)
    with _cache_events() as events:
        compiled = lowered.compile()
    # What XLA's CPU backend has from JAX's cache and writes again lacks functions when it runs.
    if events == ["cache_misses"]:
        # Some backends are unable to; then there is JAX's cache.
        with contextlib.suppress(ValueError, NotImplementedError, JaxRuntimeError, InputError):
            write_atomically(path, pickle.dumps(serialize_executable.serialize(compiled)))
    return compiled


@contextlib.contextmanager
def _cache_events() -> Iterator[list[str]]:
    """Collects whether this thread's compilations were in JAX's cache: hits and misses."""
    events, thread = [], threading.get_ident()

    def listen(event: str, **_: Any) -> None:
        name = event.rpartition("/")[2]
        if threading.get_ident() == thread and name in ("cache_hits", "cache_misses"):
            events.append(name)

    jax.monitoring.register_event_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_listener(listen)


def _key(config: TrainConfig, mesh: jax.sharding.Mesh, arguments: Any) -> str:
    source = hashlib.sha256()
    package = Path(fetal_flax.__file__).parent
    for path in sorted(package.rglob("*.py")):
        source.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    devices = mesh.devices.flat
    # Where JAX's cache lies changes no step; all its other settings may.
    settings = {n: v for n, v in jax.config.values.items() if n != "jax_compilation_cache_dir"}
    facts = (
        source.hexdigest(),
        [importlib.metadata.version(package) for package in _PACKAGES],
        to_dict(config),
        [(device.id, device.device_kind) for device in devices],
        (devices[0].client.platform, devices[0].client.platform_version),
        sorted(settings.items()),
        os.environ.get("XLA_FLAGS"),
        jax.tree.flatten(arguments),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _load(path: Path) -> jax.stages.Compiled | None:
    if not path.exists():
        return None
    try:
        return serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()))
    except Exception:  # Whatever is wrong with it, compiling anew is right.
        return None
