"""What `make test-oldest` installs is what `pyproject.toml` declares to be enough."""

import re
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.oldest import PYPROJECT, oldest

DECLARED = tomllib.loads(PYPROJECT.read_text())
VERSIONS = dict(line.split("==") for line in oldest(DECLARED))
PROJECT = DECLARED["project"]
EXTRAS = [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
REQUIREMENTS = [*DECLARED["build-system"]["requires"], *PROJECT["dependencies"], *EXTRAS]


def example(*dependencies: str, **extras: list[str]) -> dict[str, Any]:
    project = {"name": "fulgurite", "dependencies": list(dependencies), "optional-dependencies": extras}
    return {"build-system": {"requires": ["setuptools>=77"]}, "project": project}


def test_requirements_become_constraints() -> None:
    found = list(oldest(example("torch>=2.8", "lightning >=2.5, <3", cli=["jsonargparse[signatures,x]<5,>=4.40"])))
    assert found == ["setuptools==77", "torch==2.8", "lightning==2.5", "jsonargparse==4.40"]


def test_an_extra_within_an_extra_is_none_of_them() -> None:
    assert list(oldest(example(dev=["fulgurite[cli]"]))) == ["setuptools==77"]


@pytest.mark.parametrize("requirement", ["torch", "torch<3", "torch[opt]!=2.8", "torch>2"])
def test_a_requirement_says_where_it_begins(requirement: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"`{requirement}` names no oldest version: write `torch>=VERSION`")):
        list(oldest(example(requirement)))


@pytest.mark.parametrize("requirement", [text for text in REQUIREMENTS if not text.startswith("fulgurite[")])
def test_nothing_older_is_declared(requirement: str) -> None:
    required = Requirement(requirement)
    version = VERSIONS[required.name]
    assert required.specifier.contains(version)
    assert not required.specifier.contains(f"{version}.dev0", prereleases=True)


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        ("README.md", "# Python {python}, torch {torch}, lightning {lightning}, or newer"),
        ("docs/index.md", "needs Python {python} or newer, PyTorch {torch} and Lightning {lightning}."),
    ],
)
def test_the_pages_state_them(page: str, sentence: str) -> None:
    python = PROJECT["requires-python"].removeprefix(">=")
    assert sentence.format(python=python, **VERSIONS) in (PYPROJECT.parent / page).read_text()
