"""Imports scripts of ``benchmarks/``, which find each other beside themselves."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load_benchmark(file: str, name: str | None = None) -> ModuleType:
    """``benchmarks/FILE.py``, once, under ``name`` or its own name."""
    name = name or file
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{file}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
