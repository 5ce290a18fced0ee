"""Imports scripts of ``benchmarks/``, which find each other beside themselves."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load_benchmark(file: str) -> ModuleType:
    """``benchmarks/FILE.py``, once; all but the scripts' helpers under another name, for an example has theirs."""
    name = file if file.startswith("_") else f"bench_{file}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{file}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        with patch.object(sys, "path", [str(FOLDER), *sys.path]):
            spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
