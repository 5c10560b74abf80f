"""Fetal-head segmentation and head circumference on HC18 in JAX/Flax."""


def __getattr__(name: str) -> str:
    """Looks up `__version__`, the installed package's, when it is asked for (PEP 562)."""
    if name == "__version__":
        import importlib.metadata

        try:
            return importlib.metadata.version("fetal_flax")
        except importlib.metadata.PackageNotFoundError:
            raise AttributeError("fetal_flax is not installed: it has no __version__") from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
