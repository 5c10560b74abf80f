"""What XLA compiled, kept for the next start; imports no JAX, since it has to be set before."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

from fetal_flax._util.cache_folder import writable_folder

_DIRECTORY = "JAX_COMPILATION_CACHE_DIR"
_SHORTEST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def keep_compilations(cache_dir: str) -> None:
    """Makes JAX keep its compilations under `cache_dir`, unless the environment says where.

    Without effect where nothing can be written, and where JAX was imported before. Processors
    differ in the instructions that they have, and what was compiled for one may crash another;
    each kind has its own folder, as has each version of jaxlib.
    """
    if _DIRECTORY in os.environ:
        return
    try:
        folder = writable_folder(Path(cache_dir, "compiled", _machine()))
    except (OSError, RuntimeError):
        return
    os.environ[_DIRECTORY] = str(folder)
    # JAX's default, a second, leaves out half of what a start compiles.
    os.environ.setdefault(_SHORTEST, "0.1")


def _machine() -> str:
    """Returns 16 hex digits for the processor's kind and jaxlib's version."""
    facts = [platform.machine(), platform.processor(), importlib.metadata.version("jaxlib")]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # No Linux.
        lines = []
    facts += sorted({line for line in lines if line.startswith(("flags", "Features"))})
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
