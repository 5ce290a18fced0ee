"""The example that a file of tests is named after."""

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """``examples/NAME.py`` in ``test_NAME.py``; what it silences is heard again after the test."""
    monkeypatch.syspath_prepend(EXAMPLES)
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    yield importlib.import_module(request.path.stem.removeprefix("test_"))
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
