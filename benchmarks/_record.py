"""What every result says about the run it comes from."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def record(*, peers: tuple[str, ...] = (), **results: Any) -> dict[str, Any]:
    """The results, and with them the commit, the machine and the versions, also of the ``peers`` (distributions)."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        **results,
        "commit": _commit(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "versions": versions | {peer: version(peer) for peer in peers},
    }


def write(name: str, payload: dict[str, Any]) -> Path:
    """Writes ``benchmarks/results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(payload, indent=2) + "\n")
    return path


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    q25, median, q75 = quantiles(values, n=4, method="inclusive")
    return {"median": median, "q25": q25, "q75": q75}


def _commit() -> str | None:
    """The commit checked out, with ``+`` when tracked files differ from it; None without git or before the first."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        found = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
