import doctest
import importlib
import inspect
import pkgutil

import pytest

from fetal_flax import models

pytestmark = pytest.mark.usefixtures("quick_compilation")

# What `functional` has is public as `fetal_flax.NAME`; test_interface.py runs its examples.
MODULES = [
    f"{models.__name__}.{module.name}"
    for module in pkgutil.iter_modules(models.__path__)
    if module.name != "functional"
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name):
    assert not doctest.testmod(importlib.import_module(name)).failed


@pytest.mark.parametrize("name", models.__all__)
def test_everything_public_has_an_example(name):
    [own, *_] = doctest.DocTestFinder(recurse=False).find(getattr(models, name), name)
    assert own.examples


@pytest.mark.parametrize("name", [n for n in models.__all__ if n[0].isupper()])
def test_blocks_take_plain_arguments(name):
    arguments = inspect.signature(getattr(models, name)).parameters.values()
    assert not [argument for argument in arguments if "fetal_flax" in str(argument.annotation)]
