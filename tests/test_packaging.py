"""What is said of the package in more than one place is the same everywhere."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fetal_flax as ff

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = [text for texts in PROJECT["optional-dependencies"].values() for text in texts]
PINS = {
    canonicalize_name(requirement.name): requirement
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.lstrip().startswith("#")
    for requirement in [Requirement(line)]
}


def requirements(texts: list[str]) -> list[Requirement]:
    """Returns them without the package's own extras."""
    found = [Requirement(text) for text in texts]
    return [requirement for requirement in found if requirement.name != PROJECT["name"]]


@pytest.mark.parametrize("requirement", requirements(PROJECT["dependencies"]), ids=str)
def test_a_dependency_has_a_floor(requirement):
    assert {specifier.operator for specifier in requirement.specifier} & {">=", "=="}


@pytest.mark.parametrize(
    "requirement", requirements([*PROJECT["dependencies"], *EXTRAS]), ids=lambda r: r.name
)
def test_the_version_that_ci_tests_is_one_of_those_promised(requirement):
    pin = PINS[canonicalize_name(requirement.name)]
    (specifier,) = pin.specifier
    assert specifier.operator == "==" and requirement.specifier.contains(specifier.version)


def test_the_citation_is_of_this_version():
    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"version: {PROJECT['version']}" in lines
    assert f"license: {PROJECT['license']}" in lines
    assert PROJECT["version"] == ff.__version__


def test_the_workflow_takes_actions_by_commit_and_every_python_that_is_promised():
    (workflow,) = (ROOT / ".github" / "workflows").glob("*.yml")
    text = workflow.read_text(encoding="utf-8")
    used = re.findall(r"uses: (.*)", text)
    assert used
    for action in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)
    prefix = "Programming Language :: Python :: 3."
    minors = [c.removeprefix(prefix) for c in PROJECT["classifiers"] if c.startswith(prefix)]
    versions = ", ".join(f'"3.{minor}"' for minor in minors)
    assert f"python: [{versions}]" in text
