"""The example that a file of tests is named after."""

import importlib
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """``examples/NAME.py`` in ``test_NAME.py``; what it silences is heard again after the test."""
    name = request.path.stem.removeprefix("test_")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])  # LightningCLI warns of arguments in two places
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    yield importlib.import_module(name)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What an example and its processes print in 80 columns, without what gloo of torch 2.8 says of its connections."""
    monkeypatch.setenv("COLUMNS", "80")

    def read() -> str:
        out = re.sub(r"\[Gloo\].*\n", "", capfd.readouterr().out)
        assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 80
        return out

    return read
