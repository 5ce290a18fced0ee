"""What the pages show of a command is what the command prints."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn

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


PAGES = ["exponentiated_gradient", "jacobian_homeostasis"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_python_runs_as_the_page_shows_it(page: str) -> None:
    for block in blocks(page, "python"):
        names: dict[str, Any] = {}
        exec(block, names)
        if "Model" in names:
            model = names["Model"]()
            (model.net(torch.rand(3, 64)).square().sum()).backward()
            if "def configure_optimizers" in block:
                model.configure_optimizers().step()
        if "layer" in names:
            inputs = 10 if "Ring" in names else 64
            names["layer"](torch.rand(3, inputs)).square().sum().backward()


class WithNet(LightningModule):
    """What the pages say that a module takes."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Linear(64, 10)


@pytest.mark.parametrize("page", PAGES)
def test_yaml_builds_as_the_page_shows_it(page: str) -> None:
    (block,) = blocks(page, "yaml")
    config = yaml.safe_load(block)
    expected = [part["class_path"].rpartition(".")[2] for part in config["trainer"]["callbacks"]]
    config["trainer"] |= {"accelerator": "cpu", "logger": False}
    cli = LightningCLI(WithNet, args=config, run=False, save_config_callback=None)
    assert set(expected) <= {type(callback).__name__ for callback in cli.trainer.callbacks}
    cli.model.net(torch.rand(3, 64)).sum().backward()
