"""The table of what goes with what: found by probes, kept as JSON, written as Markdown."""

import importlib.metadata
import sys
from typing import Any

_MARKS = {"works": "yes", "refused": "no", "fails": "**fails**", "untried": "?"}


def measure() -> dict[str, Any]:
    """Runs all probes, some minutes long.

    Returns:
        The versions that it is of, and under ``cells`` by row and column an outcome and its reason.
    """
    from fulgurite.commands.probes import COLUMNS, ROWS, probe  # imports torch, which the list of methods does without

    versions = {name: importlib.metadata.version(name) for name in ("lightning", "torch")}
    cells: dict[str, dict[str, tuple[str, str]]] = {}
    for number, row in enumerate(ROWS, start=1):
        print(f"\r{number} of {len(ROWS)}", end="\n" if number == len(ROWS) else "", file=sys.stderr, flush=True)
        cells[row.name] = {column.name: probe(row, column) for column in COLUMNS}
    return {"versions": versions, "cells": cells}


def render(found: dict[str, Any]) -> str:
    """The table in Markdown, its reasons numbered below."""
    notes: dict[str, int] = {}

    def told(outcome: str, reason: str) -> str:
        number = notes.setdefault(reason, len(notes) + 1) if reason else None
        return _MARKS[outcome] + (f" {number}" if number else "")

    columns = list(next(iter(found["cells"].values())))
    lines = [["", *(f"`{column}`" for column in columns)], ["---"] * (len(columns) + 1)]
    lines += [[row, *(told(*cells[column]) for column in columns)] for row, cells in found["cells"].items()]
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*table, "", *(f"{number}. {reason}" for reason, number in notes.items())])
