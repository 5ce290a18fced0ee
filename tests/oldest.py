"""Prints the oldest versions that `pyproject.toml` declares, as constraints for pip; see `make test-oldest`."""

import re
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def oldest(pyproject: dict[str, Any]) -> Iterator[str]:
    """One `name==version` a requirement, without its extras: pip takes none in constraints."""
    project = pyproject["project"]
    extras = chain.from_iterable(project["optional-dependencies"].values())
    for requirement in (*pyproject["build-system"]["requires"], *project["dependencies"], *extras):
        name, bound = re.fullmatch(r"([\w.-]+)(?:\[[^]]*\])?(.*)", requirement).groups()
        if name == project["name"]:
            continue  # one extra that takes in another
        lower = re.search(r">=\s*([\w.]+)", bound)
        if lower is None:
            raise ValueError(f"`{requirement}` names no oldest version: write `{name}>=VERSION`")
        yield f"{name}=={lower[1]}"


if __name__ == "__main__":
    print(*oldest(tomllib.loads(PYPROJECT.read_text())), sep="\n")
