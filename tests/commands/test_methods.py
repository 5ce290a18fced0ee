"""The command lists what there is."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.strategies import StrategyRegistry
from torch.optim import Optimizer

import fulgurite.callbacks
import fulgurite.plugins.optim
import fulgurite.strategies  # registers the names
from fulgurite.commands.main import main
from fulgurite.commands.methods import METHODS, Method

DOCS = Path(__file__).parents[2] / "docs"
NAMES = {name for method in METHODS for name in method.names.split()}
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.names)


@pytest.mark.parametrize(
    ("package", "base"),
    [(fulgurite.callbacks, Callback), (fulgurite.plugins.optim, Optimizer)],
    ids=["callback", "optim"],
)
def test_every_public_class_is_listed(package: object, base: type) -> None:
    public = {name: getattr(package, name) for name in package.__all__}
    classes = {name for name, value in public.items() if isinstance(value, type) and issubclass(value, base)}
    assert classes
    assert classes <= NAMES


def test_every_registered_strategy_is_listed() -> None:
    ours = {name for name, entry in StrategyRegistry.items() if entry["strategy"].__module__.startswith("fulgurite.")}
    plain = {name.removesuffix("_fork").removesuffix("_spawn") for name in ours}
    assert plain == {name for method in METHODS if method.kind == "strategy" for name in method.names.split()} - {
        "client_app",
        "server_app",
    }


@each_method
def test_it_is_told_from_its_docstring(method: Method) -> None:
    module, _, name = method.path.rpartition(".")
    first = (getattr(importlib.import_module(f"fulgurite.{module}"), name).__doc__ or "").partition("\n")[0]
    assert method.summary.endswith(".")
    assert set(re.findall(r"\w+", method.summary)) <= set(re.findall(r"\w+", first))


@each_method
def test_its_page_and_section_are_there(method: Method) -> None:
    page, _, anchor = method.page.partition("#")
    headings = re.findall(r"^#+ (.*)$", (DOCS / page).read_text(), re.MULTILINE)
    assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 * len(METHODS)
    assert printed[0].split() == ["strategy", "streaming_diloco", "diloco", "docs/streaming_diloco.md"]


def test_listing_imports_no_torch() -> None:
    code = "import sys; from fulgurite.commands.main import main; main([]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)
