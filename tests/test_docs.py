"""What the pages show of a command is what the command prints."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
CONSOLE = re.compile(r"^```console\n\$ (?P<command>fulgurite-plan .*)\n(?P<output>(?:.*\n)*?)```$", re.MULTILINE)
EXAMPLES = [(page.name, match) for page in sorted(DOCS.glob("*.md")) for match in CONSOLE.finditer(page.read_text())]


@pytest.mark.parametrize(("page", "example"), EXAMPLES, ids=lambda value: value if isinstance(value, str) else "")
def test_the_planner_prints_what_the_page_shows(page: str, example: re.Match[str]) -> None:
    _, *arguments = shlex.split(example["command"])
    command = [sys.executable, "-m", "fulgurite.plugins.comm.plan", *arguments]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert printed == example["output"]


def test_there_is_an_example() -> None:
    assert EXAMPLES
