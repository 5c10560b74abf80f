"""Packages that only one format needs."""

import importlib.util

from fetal_flax.errors import InputError


def needs(extra: str, *packages: str) -> None:
    """Refuses to go on without packages.

    Args:
        extra: The extra of this package that brings them.
        packages: As they are imported.

    Raises:
        InputError: One of them isn't installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"this export needs {package}: install it with pip install 'fetal_flax[{extra}]'"
            )
