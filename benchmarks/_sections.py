"""What benchmarks of several sections share: ratios within a repetition, a peer's environment, a file of parts."""

import argparse
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, record, spread

Rows = dict[str, list[dict[str, float]]]  # method -> what each repetition measured
Section = Callable[..., dict[str, Any]]  # from whether to be quick, and a path where the section takes one

QUICK_RESULTS = Path(__file__).parents[1] / "build" / "benchmarks"


def ratio(rows: Rows, above: str, below: str, figure: str) -> dict[str, float]:
    """Spread of the ratios within each repetition."""
    return spread([a[figure] / b[figure] for a, b in zip(rows[above], rows[below], strict=True)])


def summary(rows: Rows) -> dict[str, dict[str, Any]]:
    return {
        name: {key: spread([row[key] for row in measured]) for key in measured[0]} for name, measured in rows.items()
    }


def target(measured: float, met: bool) -> dict[str, Any]:
    return {"measured": measured, "met": met}


def say(what: str, figures: dict[str, float]) -> None:
    print(f"{what}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)


def save(name: str, section: str, result: dict[str, Any], folder: Path) -> Path:
    """Replaces the section in ``<folder>/<name>.json``; a machine that cannot measure it takes nothing away."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    everything = json.loads(path.read_text()) if path.exists() else {}
    if "skipped" not in result or section not in everything:
        everything[section] = result
    path.write_text(json.dumps(everything, indent=2) + "\n")
    return path


def python_with(folder: Path, *packages: str) -> str:
    """A new environment in ``folder`` that sees this one's packages and has ``packages`` besides.

    Raises:
        CalledProcessError: pip could not install it.
    """
    venv.create(folder / "env", with_pip=True)
    paths = {"base": str(folder / "env"), "platbase": str(folder / "env")}
    site = Path(sysconfig.get_path("purelib", vars=paths))
    (site / "zz_parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    python = str(folder / "env" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", *packages]
    subprocess.run(install, check=True, capture_output=True, text=True, timeout=900)
    return python


def main(
    name: str,
    doc: str | None,
    sections: dict[str, Section],
    draw: Callable[[dict[str, Any], Path], list[Path]],
    paths: dict[str, tuple[str, str]] | None = None,
) -> None:
    """The command line: measures the sections that are asked for, then draws.

    ``paths`` names for a section the option, and its help, whose path it takes; None where it is not given.
    """
    paths = paths or {}
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", nargs="?", default="all", choices=[*sections, "figure", "all"])
    parser.add_argument("--quick", action="store_true", help="little of everything, into build/benchmarks")
    for option, meaning in paths.values():
        parser.add_argument(f"--{option}", type=Path, help=meaning)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was set up is taken down
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # as the processes that are measured
    folder = QUICK_RESULTS if arguments.quick else RESULTS
    for section, measure in sections.items():
        if arguments.section in (section, "all"):
            started = time.monotonic()
            given = [getattr(arguments, paths[section][0])] if section in paths else []
            result = measure(arguments.quick, *given)
            took = {"took_s": round(time.monotonic() - started), "cores": os.cpu_count()}
            print(save(name, section, record(peers=("lightning",), **result, **took), folder))
    if arguments.section in ("figure", "all"):
        print(*draw(json.loads((folder / f"{name}.json").read_text()), folder), sep="\n")
